"""Files that the package ships: the embedded checkpoint, architectures of published ones, pictures for the demo."""
