//! The engine's table of tensor types against ggml's: same ids, names and sizes, none missing.

use ggml_sys::Type;
use mneme_engine::gguf::GgmlType;

#[test]
fn the_engines_table_is_ggmls() {
    let ours: Vec<_> = GgmlType::all()
        .map(|ty| (ty.id(), ty.name(), ty.block_size(), ty.type_size()))
        .collect();
    let theirs: Vec<_> = Type::all()
        .map(|ty| (ty.id(), ty.name(), ty.block_size(), ty.type_size()))
        .collect();
    assert_eq!(ours, theirs);
}
