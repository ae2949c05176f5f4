"""Methods: their description as data, and the views, pseudo-labels and losses of which they consist."""
