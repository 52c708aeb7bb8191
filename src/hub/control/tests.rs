//! Stories of control sessions over real sockets, and hostile input over pipes.

mod hostile;
mod stories;

use std::sync::Arc;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    net::TcpStream,
};

use super::{testing::*, *};
use crate::{
    auth::sas::sign,
    base::Secret,
    hub::{record::Authentication, registry::Precondition},
    proto::mqtt::{Connect, Qos},
};
