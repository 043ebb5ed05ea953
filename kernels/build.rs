//! Compiles the CUDA kernels: with `cuda`, by nvcc into fat binaries that are embedded; with
//! `cuda-host`, as C++ for the emulation that the tests use. Without either there is nothing to do.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda-host")]
    host::build();
    #[cfg(all(feature = "cuda", not(feature = "cuda-host")))]
    nvcc::build();
}

#[cfg(feature = "cuda-host")]
mod host {
    pub(super) fn build() {
        println!("cargo::rerun-if-changed=cuda");
        cc::Build::new()
            .cpp(true)
            .std("c++17")
            .file("cuda/host/kernels.cpp")
            // The kernels are the subject of the tests: their warnings are ours. Optimised always,
            // since an emulated matrix product is slow enough as it is.
            .opt_level(2)
            .flag_if_supported("-Wall")
            .flag_if_supported("-Wno-unknown-pragmas")
            .flag_if_supported("-Wno-unused-function")
            // One rounding per product and sum on every machine that runs the tests.
            .flag_if_supported("-ffp-contract=off")
            .compile("mneme_cuda_host");
    }
}

#[cfg(all(feature = "cuda", not(feature = "cuda-host")))]
mod nvcc {
    use std::path::PathBuf;
    use std::process::{Command, exit};

    /// One file per op.
    const FILES: [&str; 14] = [
        "add",
        "attend",
        "cells",
        "gates",
        "get_rows",
        "mul_mat",
        "peak",
        "rank",
        "recur",
        "recur_chunk",
        "rms_norm",
        "rope",
        "swiglu",
        "top_k",
    ];

    pub(super) fn build() {
        println!("cargo::rerun-if-changed=cuda");
        for name in ["NVCC", "CUDA_HOME", "PATH"] {
            println!("cargo::rerun-if-env-changed={name}");
        }
        let Some(nvcc) = find() else {
            println!(
                "cargo::error=the feature `cuda` needs nvcc (CUDA 12.4 or newer): set NVCC to the program, or CUDA_HOME to \
                 the toolkit, or put nvcc in PATH; or build without `--features cuda`"
            );
            exit(1);
        };
        let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        let n_jobs = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok());
        let n_jobs: usize = n_jobs.unwrap_or(1);
        for files in FILES.chunks(n_jobs.max(1)) {
            let running: Vec<_> = files
                .iter()
                .map(|file| {
                    let child = Command::new(&nvcc)
                        .args(["-fatbin", "-O3", "-std=c++17", "-diag-suppress=177"])
                        // Ampere, Hopper, and whatever comes later through the last one's PTX.
                        .args(["-gencode", "arch=compute_80,code=sm_80"])
                        .args(["-gencode", "arch=compute_90,code=sm_90"])
                        .args(["-gencode", "arch=compute_90,code=compute_90"])
                        .arg("-o")
                        .arg(out.join(format!("{file}.fatbin")))
                        .arg(format!("cuda/{file}.cu"))
                        .spawn();
                    (file, child)
                })
                .collect();
            for (file, child) in running {
                let ok = child.and_then(|mut child| child.wait());
                if !ok.as_ref().is_ok_and(|status| status.success()) {
                    println!(
                        "cargo::error={} failed on cuda/{file}.cu: {ok:?}",
                        nvcc.display()
                    );
                    exit(1);
                }
            }
        }
    }

    fn find() -> Option<PathBuf> {
        if let Some(nvcc) = std::env::var_os("NVCC") {
            return Some(nvcc.into());
        }
        let home = std::env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
        let path = std::env::var_os("PATH").unwrap_or_default();
        home.into_iter()
            .chain(std::env::split_paths(&path))
            .map(|dir| dir.join("nvcc"))
            .find(|nvcc| nvcc.is_file())
    }
}
