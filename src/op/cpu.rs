//! What the CPU kernels share: slices out of candle storage, vectorisable exponentials, row loops.
