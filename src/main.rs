//! The `stasis` command: arguments in, exit code out.

fn main() -> std::process::ExitCode {
    stasis::cli::main()
}
