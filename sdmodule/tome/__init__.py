"""Token merging (Bolya and Hoffman 2023): fewer tokens in the UNet's attention."""
