//! CUDA C++ kernels, compiled ahead of time; this crate only hands out the images.
