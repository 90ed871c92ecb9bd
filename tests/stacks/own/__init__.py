"""The stacks' own code against our server, in the environment that `make stacks` makes."""
