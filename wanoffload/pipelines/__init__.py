"""Acting: a plan, put into effect over the components of a pipeline."""
