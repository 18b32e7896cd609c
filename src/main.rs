//! Parse, run, print the error chain, exit code.

use std::process::ExitCode;

use zebroid::Error;
use zebroid::cli::show::note;

/// Training allocates and frees many mid-sized tensors; the system allocator costs a fifth of a step.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // SAFETY: nothing has run yet, so no other thread reads the environment.
    #[allow(unsafe_code)]
    unsafe {
        zebroid::op::runtime::prepare();
    }
    match zebroid::cli::main() {
        Ok(code) => code,
        Err(error) => {
            let known = error.downcast_ref::<Error>();
            if !matches!(known, Some(Error::Closed)) {
                let said = error.to_string();
                note(format_args!("error: {said}"));
                let causes = error.chain().skip(1).map(|cause| cause.to_string());
                for cause in causes.filter(|cause| !said.contains(cause)) {
                    note(format_args!("  because: {cause}"));
                }
            }
            ExitCode::from(known.map_or(1, Error::exit_code))
        }
    }
}
