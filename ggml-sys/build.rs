//! Compiles the part of ggml that mneme needs and binds it.
//!
//! Where the sources come from, in this order:
//! 1. `GGML_SOURCE_DIR`: a folder that holds `include/ggml.h` and `src/ggml.c`, or a llama.cpp
//!    checkout with such a folder named `ggml`;
//! 2. the pinned package `llama-cpp-sys-2`, found through `cargo metadata --locked`, offline first
//!    and online after. It is in `Cargo.lock` with its checksum but never compiled as a crate, so
//!    `cargo fetch --locked` and `cargo vendor` bring it along.
//!
//! ggml itself is compiled for the architecture's baseline: the executable must start anywhere, and
//! the bytes that its quantizers write must not depend on the build machine (no contraction to FMA
//! in `ggml-quants.c`). The dot products over quantized rows are what a baseline build would make
//! slow, so the two files that hold them are compiled once more per instruction set under renamed
//! symbols, and `src/rows.rs` picks the best set that the running CPU has. The feature `native` compiles
//! ggml's CPU code for the build machine instead, for benches against whole ggml graphs.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result, bail};

const PACKAGE: &str = "llama-cpp-sys-2";

/// ggml's type-independent core. `ggml-backend*.cpp` is here because the CPU code implements that
/// interface; nothing of it runs unless a graph is computed.
const BASE_C: &[&str] = &["ggml.c", "ggml-alloc.c", "ggml-quants.c"];
const BASE_CPP: &[&str] = &[
    "ggml.cpp",
    "ggml-backend.cpp",
    "ggml-backend-meta.cpp",
    "ggml-threading.cpp",
];
const CPU_C: &[&str] = &["ggml-cpu/ggml-cpu.c", "ggml-cpu/quants.c"];
const CPU_CPP: &[&str] = &[
    "ggml-cpu/ggml-cpu.cpp",
    "ggml-cpu/traits.cpp",
    "ggml-cpu/binary-ops.cpp",
    "ggml-cpu/unary-ops.cpp",
    "ggml-cpu/vec.cpp",
    "ggml-cpu/ops.cpp",
    "ggml-cpu/tiled/tiled.cpp",
    "ggml-cpu/tiled/tiled-kernel.cpp",
];

/// One more compilation of the row functions: its name in symbols and the compiler flags. The CPU
/// features that allow it are tested in `src/rows.rs`, which lists the same names.
struct RowSet {
    name: &'static str,
    flags: &'static [&'static str],
}

const X86_64_SETS: &[RowSet] = &[
    RowSet {
        name: "avx2",
        flags: &["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"],
    },
    RowSet {
        name: "avx512",
        flags: &[
            "-mavx2",
            "-mfma",
            "-mf16c",
            "-mbmi",
            "-mbmi2",
            "-mavx512f",
            "-mavx512bw",
            "-mavx512cd",
            "-mavx512dq",
            "-mavx512vl",
            "-mavx512vnni",
        ],
    },
];
const AARCH64_SETS: &[RowSet] = &[RowSet {
    name: "dotprod",
    flags: &["-march=armv8.2-a+dotprod+fp16"],
}];

fn main() -> Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=GGML_SOURCE_DIR");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let ggml = find_ggml()?;
    let include = write_version_header(&ggml, &out)?;
    let (arch_dir, sets) = match arch.as_str() {
        "x86_64" => ("x86", X86_64_SETS),
        "aarch64" => ("arm", AARCH64_SETS),
        other => {
            bail!("ggml-sys builds for x86_64 and aarch64; the target architecture is {other}")
        }
    };
    let build = Sources {
        src: ggml.join("src"),
        includes: vec![
            include,
            ggml.join("include"),
            ggml.join("src"),
            ggml.join("src/ggml-cpu"),
        ],
    };

    // Static libraries are searched left to right: users of a symbol come before its definition.
    let arch_quants = format!("ggml-cpu/arch/{arch_dir}/quants.c");
    let native = env::var_os("CARGO_FEATURE_NATIVE").is_some();
    for set in sets {
        build.row_set(set, &arch_quants, &out)?;
    }
    build.compile("mneme_ggml_cpu_cpp", true, CPU_CPP, native);
    let mut cpu_c = CPU_C.to_vec();
    cpu_c.push(&arch_quants);
    build.compile("mneme_ggml_cpu_c", false, &cpu_c, native);
    build.compile("mneme_ggml_base_cpp", true, BASE_CPP, false);
    build.compile("mneme_ggml_base_c", false, BASE_C, false);
    if env::var("CARGO_CFG_TARGET_OS")? == "linux" {
        println!("cargo:rustc-link-lib=m");
        println!("cargo:rustc-link-lib=pthread");
    }
    bind(&ggml, &out)
}

/// The folder that holds ggml's `include` and `src`.
fn find_ggml() -> Result<PathBuf> {
    if let Some(dir) = env::var_os("GGML_SOURCE_DIR") {
        let dir = PathBuf::from(dir);
        for ggml in [dir.clone(), dir.join("ggml"), dir.join("llama.cpp/ggml")] {
            if ggml.join("include/ggml.h").is_file() && ggml.join("src/ggml.c").is_file() {
                println!("cargo:rerun-if-changed={}", ggml.display());
                return Ok(ggml);
            }
        }
        bail!(
            "GGML_SOURCE_DIR={}: no include/ggml.h and src/ggml.c in it, nor in its folder ggml",
            dir.display()
        );
    }
    let offline = locate_package(true);
    let ggml = match offline {
        Ok(dir) => dir,
        Err(offline) => locate_package(false).with_context(|| {
            format!(
                "the sources of ggml come with the package {PACKAGE}. Offline: {offline:#}. \
                 Run `cargo fetch --locked` once with network access, or set GGML_SOURCE_DIR"
            )
        })?,
    };
    Ok(ggml)
}

/// Asks cargo where the pinned package lies.
fn locate_package(offline: bool) -> Result<PathBuf> {
    let manifest_dir = env::var("CARGO_MANIFEST_DIR")?;
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args(["metadata", "--format-version=1", "--locked"])
        .current_dir(&manifest_dir);
    if offline {
        command.arg("--offline");
    }
    let output = command.output().context("cannot run cargo metadata")?;
    if !output.status.success() {
        bail!(
            "cargo metadata failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array();
    for package in packages.into_iter().flatten() {
        if package["name"] == PACKAGE {
            let manifest = package["manifest_path"].as_str().unwrap_or_default();
            let ggml = Path::new(manifest)
                .parent()
                .map(|dir| dir.join("llama.cpp/ggml"))
                .filter(|ggml| ggml.join("src/ggml.c").is_file());
            return ggml.with_context(|| format!("no llama.cpp/ggml/src/ggml.c beside {manifest}"));
        }
    }
    bail!("cargo metadata does not list {PACKAGE}")
}

/// ggml's CMake files generate `ggml-version.h`; without CMake it is written here, with the version
/// that the same CMake file states.
fn write_version_header(ggml: &Path, out: &Path) -> Result<PathBuf> {
    let cmake = fs::read_to_string(ggml.join("CMakeLists.txt")).unwrap_or_default();
    let part = |name: &str| {
        let key = format!("set(GGML_VERSION_{name} ");
        let rest = &cmake[cmake.find(&key)? + key.len()..];
        rest[..rest.find(')')?].parse::<u32>().ok()
    };
    let version = match (part("MAJOR"), part("MINOR"), part("PATCH")) {
        (Some(major), Some(minor), Some(patch)) => format!("{major}.{minor}.{patch}"),
        _ => "unknown".into(),
    };
    let include = out.join("include");
    fs::create_dir_all(&include)?;
    fs::write(
        include.join("ggml-version.h"),
        format!(
            "#pragma once\n#define GGML_VERSION \"{version}\"\n#define GGML_COMMIT \"unknown\"\n"
        ),
    )?;
    println!("cargo:rustc-env=GGML_VERSION={version}");
    Ok(include)
}

struct Sources {
    src: PathBuf,
    includes: Vec<PathBuf>,
}

impl Sources {
    /// The settings that every file shares.
    fn compiler(&self, cpp: bool) -> cc::Build {
        let mut build = cc::Build::new();
        build
            .cpp(cpp)
            .std(if cpp { "gnu++17" } else { "gnu11" })
            .warnings(false)
            .opt_level(3) // a debug build of ggml is ten times slower and nobody steps through it
            .debug(false)
            .define("NDEBUG", None)
            .define("_GNU_SOURCE", None)
            .define("_XOPEN_SOURCE", "600")
            .define("GGML_SCHED_MAX_COPIES", "4")
            .includes(&self.includes)
            .flag_if_supported("-w");
        build
    }

    fn compile(&self, library: &str, cpp: bool, files: &[&str], native: bool) {
        let mut build = self.compiler(cpp);
        if native {
            build.flag_if_supported("-march=native");
            // ggml's AMX code multiplies repacked weights and lives in files of its own, which no
            // op that we compare with needs; without them it must not be referred to.
            for flag in ["-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"] {
                build.flag_if_supported(flag);
            }
        }
        build.files(files.iter().map(|file| self.src.join(file)));
        build.compile(library);
    }

    /// Compiles the row functions for one instruction set. Every exported name gets the set's name as
    /// suffix, and a table pairs each baseline function with its namesake:
    /// `const struct { void (*baseline)(void), (*here)(void); } mneme_rows_<set>[]`, ended by nulls.
    fn row_set(&self, set: &RowSet, arch_quants: &str, out: &Path) -> Result<()> {
        let header = fs::read_to_string(self.src.join("ggml-cpu/quants.h"))
            .context("cannot read ggml-cpu/quants.h")?;
        let names = declared_functions(&header);
        if names.is_empty() {
            bail!("ggml-cpu/quants.h declares no functions: an unknown layout of ggml");
        }
        let suffix = set.name;
        let rename: String = names
            .iter()
            .map(|name| format!("#define {name} {name}_{suffix}\n"))
            .collect();
        let rename_path = out.join(format!("rename_{suffix}.h"));
        fs::write(&rename_path, rename)?;

        // The `_generic` names are aliases in some sets and functions in others; nobody calls them.
        let table_names = names.iter().filter(|name| !name.ends_with("_generic"));
        let (mut externs, mut rows) = (String::new(), String::new());
        for name in table_names {
            externs += &format!("extern void {name}(void), {name}_{suffix}(void);\n");
            rows += &format!("    {{ {name}, {name}_{suffix} }},\n");
        }
        let table = format!(
            "{externs}struct row_pair {{ void (*baseline)(void); void (*here)(void); }};\n\
             const struct row_pair mneme_rows_{suffix}[] = {{\n{rows}    {{ 0, 0 }},\n}};\n"
        );
        let table_path = out.join(format!("rows_{suffix}.c"));
        fs::write(&table_path, table)?;

        // The table first, in a library of its own and without renaming.
        let mut build = self.compiler(false);
        build.file(&table_path);
        build.compile(&format!("mneme_rows_{suffix}_table"));

        let mut build = self.compiler(false);
        for flag in set.flags {
            build.flag(flag);
        }
        build.flag("-include").flag(path_text(&rename_path)?);
        build.file(self.src.join("ggml-cpu/quants.c"));
        build.file(self.src.join(arch_quants));
        build.compile(&format!("mneme_rows_{suffix}"));
        Ok(())
    }
}

fn path_text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("the path {} is not valid UTF-8", path.display()))
}

/// The names in `void name(...)` at the start of a line.
fn declared_functions(header: &str) -> Vec<String> {
    header
        .lines()
        .filter_map(|line| line.strip_prefix("void "))
        .filter_map(|line| line.split('(').next())
        .map(|name| name.trim().to_owned())
        .collect()
}

/// Runs bindgen on the public headers.
fn bind(ggml: &Path, out: &Path) -> Result<()> {
    let include = ggml.join("include");
    let mut builder = bindgen::Builder::default()
        .header(path_text(&include.join("ggml.h"))?)
        .header(path_text(&include.join("ggml-cpu.h"))?)
        .clang_arg(format!("-I{}", path_text(&include)?))
        .layout_tests(false)
        .generate_comments(false)
        .default_enum_style(bindgen::EnumVariation::Consts)
        .prepend_enum_name(false)
        .rust_edition(bindgen::RustEdition::Edition2024)
        .parse_callbacks(Box::new(bindgen::CargoCallbacks::new()));
    // A libclang without its own resource folder (a pip wheel, a partial package) finds stddef.h
    // among the C compiler's headers.
    if let Ok(output) = cc::Build::new()
        .get_compiler()
        .to_command()
        .arg("-print-file-name=include")
        .output()
    {
        let dir = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if Path::new(&dir).is_dir() {
            builder = builder.clang_arg(format!("-idirafter{dir}"));
        }
    }
    for function in [
        // type traits and quantizers
        "ggml_version",
        "ggml_cpu_init",
        "ggml_get_type_traits",
        "ggml_get_type_traits_cpu",
        "ggml_quantize_.*",
        "ggml_validate_row_data",
        "ggml_cpu_fp.*",
        // graphs, for benches and oracle tests
        "ggml_init",
        "ggml_free",
        "ggml_used_mem",
        "ggml_tensor_overhead",
        "ggml_graph_overhead.*",
        "ggml_new_tensor.*",
        "ggml_new_graph.*",
        "ggml_build_forward_expand",
        "ggml_graph_plan",
        "ggml_graph_compute.*",
        "ggml_get_data.*",
        "ggml_nbytes",
        "ggml_nelements",
        "ggml_cont",
        "ggml_permute",
        "ggml_reshape.*",
        "ggml_view_.*",
        "ggml_mul_mat",
        "ggml_mul_mat_set_prec",
        "ggml_flash_attn_ext.*",
        "ggml_gated_delta_net",
        "ggml_ssm_conv",
        "ggml_ssm_scan",
        "ggml_rms_norm",
        "ggml_l2_norm",
        "ggml_rope_ext",
        "ggml_soft_max_ext",
        "ggml_swiglu_split",
        "ggml_silu",
        "ggml_mul",
        "ggml_add",
        "ggml_get_rows",
    ] {
        builder = builder.allowlist_function(function);
    }
    builder
        .allowlist_var("GGML_TYPE_.*|GGML_STATUS_.*|GGML_PREC_.*|GGML_ROPE_TYPE_.*")
        .generate()
        .context(
            "bindgen failed on ggml.h; it needs libclang (Debian: apt-get install libclang-dev)",
        )?
        .write_to_file(out.join("bindings.rs"))
        .context("cannot write bindings.rs")
}
