// All kernels in one translation unit, so that every one registers itself.

#include "../add.cu"
#include "../argmax.cu"
#include "../attend.cu"
#include "../cells.cu"
#include "../gates.cu"
#include "../get_rows.cu"
#include "../mul_mat.cu"
#include "../rank.cu"
#include "../rms_norm.cu"
#include "../rope.cu"
#include "../swiglu.cu"
#include "host.cpp"
