"""Files of weights: which there are, safe loading, download, conversion, exchange."""
