"""What a run would take on each device, before there is such a machine: programs compiled from shapes alone."""

from attnlab.planning.plan import Plan, Rates, plan, plans_table, unfitting_table
from attnlab.planning.programs import Case, Footprint

__all__ = ["Case", "Footprint", "Plan", "Rates", "plan", "plans_table", "unfitting_table"]
