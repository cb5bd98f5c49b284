// What nvrtc.available compiles and loads: if this runs, others can.
extern "C" __global__ void probe() {}
