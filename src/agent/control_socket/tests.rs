use tokio::io::DuplexStream;

use super::*;

/// Answers status, refuses plans, and joins `connect` to the other end of a duplex.
struct Daemon(std::sync::Mutex<Option<DuplexStream>>);

impl ControlHandler for Daemon {
    fn handle(&self, request: Request) -> BoxFuture<'_, Reply> {
        Box::pin(async move {
            match request {
                Request::Status => Reply::Json(serde_json::json!({ "usable": true })),
                Request::Plan => Reply::Refused("no file".into()),
                Request::Connect { device, target } => {
                    assert_eq!((device.to_string().as_str(), target.as_str()), ("pump-17/flow", "ssh"));
                    let target = self.0.lock().unwrap().take();
                    target.map_or_else(|| Reply::Refused("busy".into()), |target| Reply::Join(Box::new(target)))
                }
            }
        })
    }
}

struct Bench {
    path: PathBuf,
    target: DuplexStream,
    shutdown: CancellationToken,
    running: JoinSet<()>,
}

impl Bench {
    async fn start(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("culvert-{}-{name}.sock", std::process::id()));
        let (near, target) = tokio::io::duplex(1024);
        let shutdown = CancellationToken::new();
        let socket = ControlSocket::bind(&path).await.unwrap();
        let mut running = JoinSet::new();
        running.spawn(socket.run(Arc::new(Daemon(std::sync::Mutex::new(Some(near)))), shutdown.clone()));
        Self { path, target, shutdown, running }
    }

    async fn connect(&self) -> Result<Answer, CallError> {
        let (device, target) = ("pump-17/flow".parse().unwrap(), "ssh".parse().unwrap());
        call(&self.path, &Request::Connect { device, target }).await
    }

    async fn joined(&self) -> Joined {
        match self.connect().await.unwrap() {
            Answer::Joined(joined) => joined,
            Answer::Json(value) => panic!("not joined: {value}"),
        }
    }
}

#[tokio::test]
async fn requests_are_answered_or_refused_in_words() {
    let mut bench = Bench::start("answers").await;
    let Ok(Answer::Json(value)) = call(&bench.path, &Request::Status).await else { panic!("no status") };
    assert_eq!(value, serde_json::json!({ "usable": true }));
    assert!(matches!(call(&bench.path, &Request::Plan).await, Err(CallError::Refused(why)) if why == "no file"));
    assert_eq!(fs::metadata(&bench.path).unwrap().permissions().mode() & 0o777, SOCKET_MODE);
    assert!(matches!(ControlSocket::bind(&bench.path).await, Err(BindError::InUse(_))));

    bench.shutdown.cancel();
    bench.running.join_next().await.unwrap().unwrap();
    assert!(!bench.path.exists());
    assert!(matches!(call(&bench.path, &Request::Status).await, Err(CallError::NotRunning { .. })));
}

#[tokio::test]
async fn either_direction_may_end_first_and_every_byte_arrives() {
    let mut bench = Bench::start("half").await;
    let joined = bench.joined().await;
    let request = vec![7u8; 300_000];
    let (mut output, output_end) = tokio::io::duplex(1 << 20);
    let target = async {
        let mut got = Vec::new();
        bench.target.read_to_end(&mut got).await.unwrap();
        bench.target.write_all(&got).await.unwrap();
        bench.target.shutdown().await.unwrap();
    };
    let (ran, ()) = tokio::join!(joined.run(request.as_slice(), output_end), target);
    ran.unwrap();
    let mut echoed = Vec::new();
    output.read_to_end(&mut echoed).await.unwrap();
    assert_eq!(echoed, request);
}

#[tokio::test]
async fn a_cut_is_never_a_clean_end() {
    let mut bench = Bench::start("cut").await;
    let joined = bench.joined().await;
    let (_input, input_end) = tokio::io::duplex(64);
    bench.shutdown.cancel();
    bench.running.join_next().await.unwrap().unwrap();
    let error = joined.run(input_end, tokio::io::sink()).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_cut_behind_the_targets_end_is_no_clean_end_either() {
    let mut bench = Bench::start("behind").await;
    let joined = bench.joined().await;
    let (mut output, output_end) = tokio::io::duplex(64);
    let (mut input, input_end) = tokio::io::duplex(64);
    let client = async {
        bench.target.shutdown().await.unwrap();
        // The end has come through, and the client has more to say.
        assert_eq!(output.read(&mut [0]).await.unwrap(), 0);
        bench.shutdown.cancel();
        bench.running.join_next().await.unwrap().unwrap();
        input.shutdown().await.unwrap();
    };
    let (ran, ()) = tokio::join!(joined.run(input_end, output_end), client);
    assert!(ran.is_err());
}

#[tokio::test]
async fn a_client_that_dies_cuts_the_target() {
    let mut bench = Bench::start("dies").await;
    drop(bench.joined().await);
    bench.target.read_to_end(&mut Vec::new()).await.unwrap();
    assert!(matches!(bench.connect().await, Err(CallError::Refused(why)) if why == "busy"));

    // A duplex cannot tell a drop from a shutdown, so the half that would send the shutdown is asked itself.
    let mut plain = watched::Watched::default();
    let error = unpack([0, 0, 0, 3, b'a', b'b', b'c'].as_slice(), &mut plain).await.unwrap_err();
    assert_eq!((error.kind(), plain.written.as_slice()), (io::ErrorKind::ConnectionReset, b"abc".as_slice()));
    assert!(!plain.ended);
    unpack([0; 4].as_slice(), &mut plain).await.unwrap();
    assert!(plain.ended);
}

/// A writer that remembers whether it was shut down.
mod watched {
    use std::{
        io,
        pin::Pin,
        task::{Context, Poll},
    };

    #[derive(Default)]
    pub(super) struct Watched {
        pub(super) written: Vec<u8>,
        pub(super) ended: bool,
    }

    impl tokio::io::AsyncWrite for Watched {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            self.written.extend_from_slice(bytes);
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.ended = true;
            Poll::Ready(Ok(()))
        }
    }
}

#[tokio::test]
async fn one_client_too_many_is_told_so() {
    let bench = Bench::start("many").await;
    let mut clients = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        clients.push(UnixStream::connect(&bench.path).await.unwrap());
    }
    let refused = call(&bench.path, &Request::Status).await;
    assert!(matches!(refused, Err(CallError::Refused(why)) if why.starts_with("256 `culvert connect`s")));
    drop(clients);
    while call(&bench.path, &Request::Status).await.is_err() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn nonsense_is_refused_and_endless_lines_end() {
    let bench = Bench::start("nonsense").await;
    let mut client = UnixStream::connect(&bench.path).await.unwrap();
    client.write_all(b"{\"status\":1,\n").await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains("not understood"), "{answer}");

    let mut client = UnixStream::connect(&bench.path).await.unwrap();
    // The daemon may close before it has taken all of it.
    client.write_all(&vec![b'x'; MAX_LINE + 1]).await.ok();
    assert_eq!(client.read(&mut [0; 1]).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn a_dead_daemons_file_is_replaced_and_other_files_are_not() {
    let path = std::env::temp_dir().join(format!("culvert-{}-stale.sock", std::process::id()));
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    drop(ControlSocket::bind(&path).await.unwrap());
    fs::write(&path, "not a socket").unwrap();
    assert!(matches!(ControlSocket::bind(&path).await, Err(BindError::NotASocket(_))));
    fs::remove_file(&path).unwrap();
}

proptest::proptest! {
    #[test]
    fn any_chunks_unpack_to_a_prefix_or_an_error(bytes: Vec<u8>) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut out = Vec::new();
        let result = runtime.block_on(unpack(bytes.as_slice(), &mut out));
        proptest::prop_assert!(out.len() <= bytes.len());
        proptest::prop_assert_eq!(result.is_ok(), ends_cleanly(&bytes));
    }
}

/// The framing said once more, naively.
fn ends_cleanly(mut bytes: &[u8]) -> bool {
    while let Some((header, rest)) = bytes.split_first_chunk::<4>() {
        let length = u32::from_be_bytes(*header) as usize;
        if length == 0 {
            return true;
        }
        if length > MAX_CHUNK || rest.len() < length {
            return false;
        }
        bytes = &rest[length..];
    }
    false
}
