//! Child processes whose words are kept, and which end with the story.

use std::{
    io::{BufRead as _, BufReader, Read, Write as _},
    process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use super::wait::{PATIENCE, eventually, within};

/// Lines of a failed story's process that are shown.
const SHOWN: usize = 60;

/// A running program; what it writes to standard output and error is kept, line by line.
pub struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Arc<Mutex<Vec<String>>>,
    exited: Option<ExitStatus>,
}

impl Process {
    /// Starts it. Its standard input stays open until [`Process::close_stdin`].
    #[track_caller]
    pub fn start(name: impl Into<String>, command: &mut Command) -> Self {
        let name = name.into();
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| {
            panic!("{:?} cannot be started ({error}): tests/run installs what the stories need", command.get_program())
        });
        let lines = Arc::new(Mutex::new(Vec::new()));
        keep_lines(child.stdout.take().unwrap(), &lines);
        keep_lines(child.stderr.take().unwrap(), &lines);
        let stdin = child.stdin.take();
        Self { name, child, stdin, lines, exited: None }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Everything it said so far.
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    /// How many lines it has said: what [`Process::wait_for_line_after`] counts from.
    pub fn said(&self) -> usize {
        self.lines.lock().unwrap().len()
    }

    /// Waits for a line that contains all of `words`, and returns it.
    #[track_caller]
    pub fn wait_for_line(&self, words: &[&str]) -> String {
        self.wait_for_line_after(0, words)
    }

    /// The same, and does not look at the first `said` lines.
    #[track_caller]
    pub fn wait_for_line_after(&self, said: usize, words: &[&str]) -> String {
        eventually(&format!("{} to say {words:?}", self.name), || self.find_line(said, words))
    }

    fn find_line(&self, said: usize, words: &[&str]) -> Option<String> {
        let lines = self.lines.lock().unwrap();
        let fits = |line: &&String| words.iter().all(|word| line.contains(word));
        lines.iter().skip(said).find(fits).cloned()
    }

    /// Types into it.
    pub fn type_in(&mut self, text: &str) {
        self.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    /// Sends a signal, such as `HUP`.
    pub fn signal(&self, signal: &str) {
        run(Command::new("kill").args([&format!("-{signal}"), &self.id().to_string()]));
    }

    /// True while it runs.
    pub fn is_running(&mut self) -> bool {
        self.exited = self.exited.or_else(|| self.child.try_wait().unwrap());
        self.exited.is_none()
    }

    /// Waits until it ends by itself, and returns its exit code.
    #[track_caller]
    pub fn wait(&mut self) -> Option<i32> {
        self.wait_within(PATIENCE)
    }

    /// The same, with a deadline of its own.
    #[track_caller]
    pub fn wait_within(&mut self, deadline: Duration) -> Option<i32> {
        let what = format!("{} to end", self.name);
        within(deadline, &what, || (!self.is_running()).then_some(()));
        self.exited.unwrap().code()
    }

    /// SIGKILL: no farewell.
    pub fn kill(&mut self) {
        if self.is_running() {
            let _ = self.child.kill();
            self.exited = self.child.wait().ok();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            let lines = self.lines();
            let hidden = lines.len().saturating_sub(SHOWN);
            eprintln!("--- {} said ({hidden} lines before these)", self.name);
            lines.iter().skip(hidden).for_each(|line| eprintln!("{line}"));
        }
    }
}

/// Reads until the other end closes; the thread ends with the process.
fn keep_lines(from: impl Read + Send + 'static, lines: &Arc<Mutex<Vec<String>>>) {
    let lines = lines.clone();
    thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
            lines.lock().unwrap().push(text);
        }
    });
}

/// Runs a program to its end and insists on success; returns its standard output.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?} ended with {}\n{stdout}\n{stderr}", output.status);
    stdout.into_owned()
}

/// Runs a program to its end, however it ends.
#[track_caller]
pub fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|error| {
        panic!("{:?} cannot be started ({error}): tests/run installs what the stories need", command.get_program())
    })
}
