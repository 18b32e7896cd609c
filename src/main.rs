//! Parse, run, print the error chain, exit code.

use std::process::ExitCode;

use clap::Parser;

/// Training allocates and frees many mid-sized tensors; the system allocator costs a fifth of a step.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    zebroid::op::runtime::prepare();
    let cli = zebroid::cli::Cli::parse();
    match zebroid::cli::main(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            for cause in error.chain().skip(1) {
                eprintln!("  because: {cause}");
            }
            let code = error.downcast_ref::<zebroid::Error>();
            ExitCode::from(code.map_or(1, zebroid::Error::exit_code))
        }
    }
}
