"""The machine: what the planner needs of it, and how that is measured."""
