"""Sources of captioned images: folders, tar shards, Hugging Face data sets, and mixtures of them."""
