"""The model behind HTTP: what others' programs ask, and how they are answered."""
