//! An asynchronous server: tasks on a few threads, timers, channels, connections of TCP and unix sockets, a child with pipes,
//! signals, files read by threads that may block. It tells over HTTP how often each has got something done.

use std::error::Error;
use std::io;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{interval, sleep, timeout};

static DONE: [AtomicU64; 8] = [const { AtomicU64::new(0) }; 8];
const NAMES: [&str; 8] = ["ticks", "passed", "echoed", "lines", "children", "signals", "read", "timeouts"];

fn done(what: &str) {
    if let Some(at) = NAMES.iter().position(|name| *name == what) {
        DONE[at].fetch_add(1, Relaxed);
    }
}

async fn ticks() -> io::Result<()> {
    let mut every = interval(Duration::from_millis(2));
    loop {
        every.tick().await;
        done("ticks");
    }
}

/// A hundred tasks that hand something round.
async fn ring() -> io::Result<()> {
    let (first, mut from) = mpsc::channel::<u64>(4);
    for _ in 0..100 {
        let (to, next) = mpsc::channel(4);
        tokio::spawn(async move {
            while let Some(n) = from.recv().await {
                if to.send(n + 1).await.is_err() {
                    return;
                }
            }
        });
        from = next;
    }
    loop {
        first.send(0).await.map_err(io::Error::other)?;
        if from.recv().await != Some(100) {
            return Err(io::Error::other("somebody in the ring has lost count"));
        }
        done("passed");
        sleep(Duration::from_millis(1)).await;
    }
}

/// Both ends of a unix socket, and as many bytes as it takes in some turns.
async fn echo() -> io::Result<()> {
    let (mut here, mut there) = UnixStream::pair()?;
    tokio::spawn(async move {
        let mut bytes = vec![0; 10_000];
        while let Ok(n @ 1..) = there.read(&mut bytes).await {
            if there.write_all(&bytes[..n]).await.is_err() {
                return;
            }
        }
    });
    for n in 0_u8.. {
        let (sent, mut got) = (vec![n; 300_000], vec![0; 300_000]);
        let (mut read, mut write) = here.split();
        tokio::try_join!(write.write_all(&sent), read.read_exact(&mut got))?;
        if sent != got {
            return Err(io::Error::other("another thing came back"));
        }
        done("echoed");
        sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

async fn cat() -> io::Result<()> {
    let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (Some(mut to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(io::Error::other("no pipes"));
    };
    let mut from = BufReader::new(from).lines();
    loop {
        to.write_all(b"line\n").await?;
        if from.next_line().await?.as_deref() != Some("line") {
            return Err(io::Error::other("the child has lost a line"));
        }
        done("lines");
        sleep(Duration::from_millis(2)).await;
    }
}

async fn children() -> io::Result<()> {
    loop {
        if !Command::new("sleep").arg("0.02").status().await?.success() {
            return Err(io::Error::other("a child has failed"));
        }
        done("children");
    }
}

async fn signals() -> io::Result<()> {
    let mut usr1 = signal(SignalKind::user_defined1())?;
    let pid = std::process::id().to_string();
    loop {
        Command::new("kill").args(["-USR1", &pid]).status().await?;
        usr1.recv().await;
        done("signals");
        sleep(Duration::from_millis(10)).await;
    }
}

async fn files() -> io::Result<()> {
    loop {
        let text = tokio::fs::read_to_string("/etc/passwd").await?;
        if !text.starts_with("root") {
            return Err(io::Error::other("/etc/passwd is another"));
        }
        done("read");
        sleep(Duration::from_millis(1)).await;
    }
}

async fn timeouts() -> io::Result<()> {
    loop {
        if timeout(Duration::from_millis(3), std::future::pending::<()>()).await.is_err() {
            done("timeouts");
        }
    }
}

async fn answer(mut client: TcpStream) -> io::Result<()> {
    let mut asked = [0; 4096];
    // Clients that keep their connection are answered again and again.
    while client.read(&mut asked).await? > 0 {
        let counts = NAMES.iter().zip(&DONE).map(|(name, n)| format!("\"{name}\": {}", n.load(Relaxed)));
        let text = format!("{{{}}}", counts.collect::<Vec<_>>().join(", "));
        client.write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len()).as_bytes()).await?;
    }
    Ok(())
}

async fn serve() -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:8080").await?;
    loop {
        let (client, _) = listener.accept().await?;
        tokio::spawn(answer(client));
    }
}

#[tokio::main(worker_threads = 4)]
async fn main() -> Result<(), Box<dyn Error>> {
    tokio::try_join!(ticks(), ring(), echo(), cat(), children(), signals(), files(), timeouts(), serve())?;
    Ok(())
}
