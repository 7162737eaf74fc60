"""How a model runs on this machine: what was asked and what is there become a plan, and the plan a runner."""
