"""The geometry of the loss: spectra of Hessians, neural tangent kernels."""
