//! Tiles of a processor that has them ([`crate::op::isa::Level::Amx`]). The compiler knows nothing of them: what touches them is
//! written in assembly, between [`configure`] and [`release`] of one function.

use std::arch::asm;

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    zeros: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Rows and bytes of a row of each tile.
///
/// # Safety
/// The processor has tiles, and this process the permission to use them.
///
/// # Panics
/// More than 16 rows of 64 bytes.
#[allow(unsafe_code)]
pub unsafe fn configure(tiles: [(usize, usize); 8]) {
    let mut all = Configuration {
        palette: 1,
        start_row: 0,
        zeros: [0; 14],
        row_bytes: [0; 16],
        rows: [0; 16],
    };
    for (i, (rows, row_bytes)) in tiles.into_iter().enumerate() {
        assert!(rows <= 16 && row_bytes <= 64);
        all.rows[i] = rows as u8;
        all.row_bytes[i] = row_bytes as u16;
    }
    // SAFETY: the caller's promise; 64 bytes are read.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const all, options(nostack, readonly)) };
}

/// Tiles that nobody needs any more: until then every switch to another thread saves them.
///
/// # Safety
/// As [`configure`].
#[allow(unsafe_code)]
pub unsafe fn release() {
    // SAFETY: the caller's promise.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}
