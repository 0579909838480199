"""Deciding, in plain values: choices, the base rules, the cost model, the plan. No torch."""
