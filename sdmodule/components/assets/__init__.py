"""Files that the package ships: the embedded checkpoint, architectures of published ones, images for the demo."""
