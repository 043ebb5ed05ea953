//! x86-64 with AMX tiles for 8-bit integers, on top of AVX-512.
//!
//! Rust's intrinsics for AMX are not stable, so the tile instructions are assembly. A tile at most
//! 16 rows of 64 bytes.

pub(crate) mod attend;
mod invert;
pub(crate) mod mul_mat;
mod pairs;
pub(crate) mod recur;

/// What `ldtilecfg` reads: palette, bytes per row and rows of each tile.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Eight tiles of 16 rows of 64 bytes.
pub(crate) const CONFIG: TileConfig = TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Tokens (tiles 4 and 5) of 32 columns times weights (6 and 7) of 32 columns, four results.
pub(crate) const CONFIG_32: TileConfig = TileConfig {
    row_bytes: [64, 64, 64, 64, 32, 32, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0],
    ..CONFIG
};
