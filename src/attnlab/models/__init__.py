"""Models: pure equations and the Flax modules over them."""
