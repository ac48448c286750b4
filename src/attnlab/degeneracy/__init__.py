"""How degenerate a minimum is: the local learning coefficient by sampling, exact values, and the Hessian beside it."""
