//! `mneme quantize`: a GGUF file becomes a smaller one.

use crate::convert::{ggml_type, parse_size, print_written, use_threads, watched};
use anyhow::Result;
use mneme_convert::{
    FileType, Imatrix, MixOptions, OutputOptions, QuantizeOptions, Regex, Type, quantize,
};
use std::path::PathBuf;

/// Arguments of `mneme quantize`.
#[derive(clap::Args)]
#[command(after_help = help())]
pub struct Args {
    /// GGUF to read, best in f16, bf16 or f32; of a split file, the first part
    #[arg(value_name = "INPUT")]
    input: PathBuf,
    /// GGUF to write
    #[arg(value_name = "OUTPUT")]
    output: PathBuf,
    /// File type, such as Q4_K_M; the list is below
    #[arg(value_name = "TYPE", value_parser = parse_file_type)]
    file_type: FileType,
    /// Importance matrix measured by llama.cpp's imatrix tool (GGUF or the older .dat)
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// The same type for every matrix, no mixture
    #[arg(long)]
    pure: bool,
    /// Type of output.weight
    #[arg(long, value_name = "TYPE", value_parser = ggml_type::parse)]
    output_tensor_type: Option<Type>,
    /// Type of token_embd.weight
    #[arg(long, value_name = "TYPE", value_parser = ggml_type::parse)]
    token_embedding_type: Option<Type>,
    /// Type of the tensors whose name the pattern (a regular expression) is found in; may be repeated, the
    /// first that fits counts
    #[arg(long, value_name = "PATTERN=TYPE", value_parser = parse_tensor_type)]
    tensor_type: Vec<(Regex, Type)>,
    /// Leave output.weight as it is
    #[arg(long)]
    leave_output_tensor: bool,
    /// Quantize again what is quantized already: quality is lost twice
    #[arg(long)]
    allow_requantize: bool,
    /// Split the output into parts of at most this much tensor data, such as 4G or 500M
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    split_max_size: Option<u64>,
    /// Replace the output if it exists
    #[arg(short, long)]
    force: bool,
    /// Threads [default: all cores]
    #[arg(short, long, value_name = "N", value_parser = crate::args::parse_positive)]
    threads: Option<usize>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    use_threads(args.threads)?;
    let options = QuantizeOptions {
        input: args.input.clone(),
        output: OutputOptions {
            path: args.output.clone(),
            overwrite: args.force,
            split_max_bytes: args.split_max_size,
        },
        file_type: args.file_type,
        mix: MixOptions {
            pure: args.pure,
            output_type: args.output_tensor_type,
            embedding_type: args.token_embedding_type,
            patterns: args.tensor_type.clone(),
            keep_output: args.leave_output_tensor,
            has_imatrix: false, // set by the library, from the matrix itself
        },
        imatrix: args.imatrix.as_deref().map(Imatrix::open).transpose()?,
        allow_requantize: args.allow_requantize,
    };
    let written = watched("quantizing", |progress| quantize(&options, progress))?;
    print_written(&written, args.file_type.name());
    Ok(())
}

fn help() -> String {
    let mut text = String::from(
        "The mixtures are llama.cpp's: the same tensors get the same types and bytes. Rows that a type's blocks do \
         not divide get a neighbouring type. Of a memory, only the large matrices of a nodes compressor are \
         quantized (Q8_0).\n\nTypes, with bits per weight:\n",
    );
    for ty in FileType::ALL {
        text += &format!("  {:<10} {}\n", ty.name(), ty.about());
    }
    text + "\nExamples:\n  mneme quantize model-f16.gguf model-q4_k_m.gguf Q4_K_M\n  \
            mneme quantize model-bf16.gguf small.gguf IQ3_XS --imatrix model.imatrix\n  \
            mneme quantize model-f16.gguf m.gguf Q4_K_M --tensor-type ffn_down=q6_K"
}

fn parse_file_type(text: &str) -> Result<FileType, String> {
    FileType::from_name(text).ok_or_else(|| {
        let names: Vec<_> = FileType::ALL.iter().map(|ty| ty.name()).collect();
        format!("the types are {}", names.join(", "))
    })
}

/// `ffn_down=q6_K`.
fn parse_tensor_type(text: &str) -> Result<(Regex, Type), String> {
    let (pattern, ty) = text
        .rsplit_once('=')
        .ok_or("expected PATTERN=TYPE, such as ffn_down=q6_K")?;
    // Tensor names are in lower case.
    let pattern = Regex::new(&pattern.to_lowercase()).map_err(|error| error.to_string())?;
    Ok((pattern, ggml_type::parse(ty)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensor_types_are_read() {
        let (pattern, ty) = parse_tensor_type("FFN_(up|gate)=q5_k").unwrap();
        assert!(pattern.is_match("blk.3.ffn_gate.weight"));
        assert!(!pattern.is_match("blk.3.ffn_down.weight"));
        assert_eq!(ty.name(), "q5_K");
        for bad in ["ffn_up", "ffn_up=", "(=q8_0", "a=q4_k_m"] {
            assert!(parse_tensor_type(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_file_type_is_in_the_help() {
        let help = help();
        assert!(FileType::ALL.iter().all(|ty| help.contains(ty.name())));
        assert!(parse_file_type("q4_k").is_ok_and(|ty| ty == FileType::Q4_K_M));
        assert!(parse_file_type("q4").is_err());
    }
}
