"""Geometry of the loss: Hessian spectra and neural tangent kernels."""
