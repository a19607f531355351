"""CPU kernels for the layers of UNet and VAE; `sdmodule.speed.cpu.kernels` is the interface to them."""
