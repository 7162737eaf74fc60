"""How the embedded model was made: its text by rules, its training and its evaluation."""
