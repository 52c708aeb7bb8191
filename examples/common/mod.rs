//! What the examples share: credentials from the environment, never from the command line, and the proxies' loop.

#![allow(dead_code, reason = "each example uses its part")]

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, copy, split},
    net::TcpStream,
};

/// The connection string: `$CULVERT_CONNECTION_STRING`, or the contents of `$CULVERT_CONNECTION_STRING_FILE`.
/// Every user of the machine can read argv.
pub(crate) fn connection_string() -> io::Result<String> {
    if let Ok(text) = env::var("CULVERT_CONNECTION_STRING") {
        return Ok(text);
    }
    let path = env::var_os("CULVERT_CONNECTION_STRING_FILE").ok_or_else(|| {
        io::Error::other(
            "set CULVERT_CONNECTION_STRING or CULVERT_CONNECTION_STRING_FILE; `culvert registry add` prints it",
        )
    })?;
    Ok(fs::read_to_string(path)?.trim().to_owned())
}

/// The CA of the hub's certificate, if the system does not know it: `$CULVERT_CA_FILE`.
pub(crate) fn ca_file() -> Option<PathBuf> {
    env::var_os("CULVERT_CA_FILE").map(PathBuf::from)
}

/// Where an example of a device keeps its installation's ID: `$CULVERT_STATE_DIR`, else the folder it runs in.
pub(crate) fn state_dir() -> PathBuf {
    env::var_os("CULVERT_STATE_DIR").map_or_else(|| Path::new(".").to_owned(), PathBuf::from)
}

/// The n-th argument.
pub(crate) fn argument(number: usize, what: &str) -> io::Result<String> {
    env::args().nth(number).ok_or_else(|| io::Error::other(format!("argument {number} is {what}")))
}

/// Copies both ways until either side ends: a device stream of the SDKs has no half-close. An error leaves the device
/// stream without a Close, so that the other side sees a cut and not an end.
pub(crate) async fn join(mut socket: TcpStream, io: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let (mut from_far, mut to_far) = split(io);
    let (mut from_near, mut to_near) = socket.split();
    tokio::select! {
        ended = copy(&mut from_near, &mut to_far) => ended?,
        ended = copy(&mut from_far, &mut to_near) => ended?,
    };
    to_far.shutdown().await
}
