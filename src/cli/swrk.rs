//! Answering as the `criu` program, whose version Podman asks for through `criu swrk FD`.
//!
//! ```text
//!   request   { 1: type, 5: features asked for }          one SEQPACKET message each, protobuf
//!   answer    { 1: type, 2: success, 8: features { 1: memory tracking }, 9: why not, 10: version { 1: 4, 2: 2 } }
//! ```
//!
//! Nothing is checkpointed this way: the runtime does that.

use std::os::fd::RawFd;
use std::process::ExitCode;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use prost::Message;

/// The release of CRIU whose image format is written.
const FORMAT: Version = Version { major: 4, minor: 2 };

const FEATURE_CHECK: i32 = 9;
const VERSION: i32 = 10;

#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(int32, required, tag = "1")]
    kind: i32,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct Version {
    #[prost(int32, required, tag = "1")]
    major: i32,
    #[prost(int32, required, tag = "2")]
    minor: i32,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct Features {
    #[prost(bool, optional, tag = "1")]
    memory_tracking: Option<bool>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct Answer {
    #[prost(int32, required, tag = "1")]
    kind: i32,
    #[prost(bool, required, tag = "2")]
    success: bool,
    #[prost(message, optional, tag = "8")]
    features: Option<Features>,
    #[prost(string, optional, tag = "9")]
    why: Option<String>,
    #[prost(message, optional, tag = "10")]
    version: Option<Version>,
}

/// The command line after the program's name.
pub fn main(args: &[String]) -> ExitCode {
    match args {
        [flag, ..] if flag == "--version" || flag == "-V" => {
            println!("Version: {}.{} (images of this version, by Stasis)", FORMAT.major, FORMAT.minor);
            ExitCode::SUCCESS
        }
        [command, fd, ..] if command == "swrk" => match fd.parse::<RawFd>() {
            Ok(fd) => serve(fd),
            Err(_) => ExitCode::FAILURE,
        },
        _ => {
            eprintln!("criu: this is Stasis, which answers `criu --version` and `criu swrk` only");
            ExitCode::FAILURE
        }
    }
}

fn serve(fd: RawFd) -> ExitCode {
    let mut buffer = [0; 4096];
    loop {
        let length = match recv(fd, &mut buffer, MsgFlags::empty()) {
            Ok(0) => return ExitCode::SUCCESS,
            Ok(length) => length,
            Err(Errno::EINTR) => continue,
            Err(_) => return ExitCode::FAILURE,
        };
        let Ok(request) = Request::decode(&buffer[..length]) else { return ExitCode::FAILURE };
        if send(fd, &answer(request.kind).encode_to_vec(), MsgFlags::MSG_NOSIGNAL).is_err() {
            return ExitCode::FAILURE;
        }
    }
}

fn answer(kind: i32) -> Answer {
    let mut answer = Answer { kind, success: true, features: None, why: None, version: None };
    match kind {
        VERSION => answer.version = Some(FORMAT),
        // Where the kernel has no way to note writes a pre-dump works all the same; it only saves nothing.
        FEATURE_CHECK => answer.features = Some(Features { memory_tracking: Some(true) }),
        _ => {
            answer.success = false;
            answer.why = Some("Stasis checkpoints as a runtime, not as a CRIU service".into());
        }
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_what_podman_expects() {
        assert_eq!(Request::decode(&[0x08, 0x0a][..]).unwrap().kind, VERSION);
        assert_eq!(answer(VERSION).encode_to_vec(), [0x08, 0x0a, 0x10, 1, 0x52, 4, 8, 4, 0x10, 2]);
    }

    #[test]
    fn a_question_about_features_is_read_past_its_type() {
        let asked = [0x08, 0x09, 0x2a, 0x02, 0x08, 0x01];
        assert_eq!(Request::decode(&asked[..]).unwrap().kind, FEATURE_CHECK);
        assert!(!answer(1).success);
    }
}
