"""A coordinator and the members of a fleet, in virtual time and over a simulated network."""
