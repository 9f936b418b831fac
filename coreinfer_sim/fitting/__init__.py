"""Sets of neurons whose held ones make up for the dropped ones."""
