"""How good a model is: tasks, their data and answers, and what two runs say of each other."""
