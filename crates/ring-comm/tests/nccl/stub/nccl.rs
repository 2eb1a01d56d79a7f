//! NCCL: communicators whose calls do not block, over sockets of the file system.

use std::{
    cell::RefCell,
    collections::HashMap,
    env,
    ffi::{CStr, c_char, c_int, c_void},
    io::{ErrorKind, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    process,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use crate::{
    SUCCESS, cuda,
    cuda::{Stream, readable, writable},
    refuse,
};

const IN_PROGRESS: c_int = 7;
const MAGIC: u32 = 0xcafe_beef;
const ID_BYTES: usize = 128;
/// Between two looks.
const PAUSE: Duration = Duration::from_micros(200);

struct Communicator {
    /// What all of its ranks' sockets are called, but for the rank.
    name: String,
    rank: i32,
    state: AtomicI32,
    is_aborted: AtomicBool,
    /// From and to the peers.
    incoming: Mutex<HashMap<i32, UnixStream>>,
    outgoing: Mutex<HashMap<i32, UnixStream>>,
}

#[derive(Clone, Copy)]
struct Half {
    is_send: bool,
    address: u64,
    bytes: usize,
    peer: i32,
}

/// What is between the start and the end of a group.
#[derive(Default)]
struct Group {
    depth: usize,
    halves: Vec<Half>,
    target: Option<(Arc<Communicator>, Arc<Stream>)>,
}

thread_local! {
    static GROUP: RefCell<Group> = RefCell::default();
}

#[repr(C)]
struct UniqueId([c_char; ID_BYTES]);

/// The beginning of a configuration.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

impl Communicator {
    fn socket(&self, rank: i32) -> PathBuf {
        // The folder of the launch goes with it, also if this process is killed.
        let folder = env::var_os("RING_TEST_FINDINGS").map(PathBuf::from);
        let folder = folder.unwrap_or_else(env::temp_dir);
        folder.join(format!("{}-{rank}", self.name))
    }

    fn is_aborted(&self) -> bool {
        self.is_aborted.load(Ordering::Acquire)
    }

    /// Lets peers connect, until it is over.
    fn listen(&self, world_size: i32) {
        let path = self.socket(self.rank);
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut is_complete = false;
        while !self.is_aborted() {
            if !is_complete && (0..world_size).all(|rank| self.socket(rank).exists()) {
                is_complete = true;
                self.state.store(SUCCESS, Ordering::Release);
            }
            match listener.accept() {
                Ok((mut stream, _)) => {
                    let mut rank = [0; 4];
                    if stream.read_exact(&mut rank).is_ok() {
                        stream.set_nonblocking(true).unwrap();
                        let rank = i32::from_le_bytes(rank);
                        self.incoming.lock().unwrap().insert(rank, stream);
                    }
                }
                Err(_) => thread::sleep(PAUSE),
            }
        }
        let _ = std::fs::remove_file(path);
    }

    fn connected(&self, half: Half) -> Option<UnixStream> {
        while !self.is_aborted() {
            let found = match half.is_send {
                true => self.connect(half.peer),
                false => self
                    .incoming
                    .lock()
                    .unwrap()
                    .get(&half.peer)
                    .map(|stream| stream.try_clone().unwrap()),
            };
            if found.is_some() {
                return found;
            }
            thread::sleep(PAUSE);
        }
        None
    }

    fn connect(&self, peer: i32) -> Option<UnixStream> {
        let mut outgoing = self.outgoing.lock().unwrap();
        if let Some(stream) = outgoing.get(&peer) {
            return stream.try_clone().ok();
        }
        let mut stream = UnixStream::connect(self.socket(peer)).ok()?;
        stream.write_all(&self.rank.to_le_bytes()).ok()?;
        stream.set_nonblocking(true).unwrap();
        let clone = stream.try_clone().ok();
        outgoing.insert(peer, stream);
        clone
    }

    /// Like the true one it waits for a peer that is gone until it is aborted.
    fn transfer(&self, half: Half) {
        let Some(mut stream) = self.connected(half) else {
            return;
        };
        let mut done = 0;
        while done < half.bytes && !self.is_aborted() {
            // SAFETY: whoever issued the half has promised that the memory is there and used by nobody else.
            let moved = unsafe {
                match half.is_send {
                    true => stream.write(&readable(half.address, half.bytes)[done..]),
                    false => stream.read(&mut writable(half.address, half.bytes)[done..]),
                }
            };
            match moved {
                Ok(bytes) if bytes > 0 => done += bytes,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => thread::sleep(PAUSE),
            }
        }
    }

    fn run(&self, halves: &[Half]) {
        thread::scope(|scope| {
            for &half in halves {
                scope.spawn(move || self.transfer(half));
            }
        });
    }
}

/// # Safety
/// The handle is a communicator of this library that is not given up.
unsafe fn communicator(handle: *const Communicator) -> Arc<Communicator> {
    // SAFETY: as promised, it came from an `Arc`, of which the handle keeps one.
    unsafe {
        Arc::increment_strong_count(handle);
        Arc::from_raw(handle)
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclGetVersion(version: *mut c_int) -> c_int {
    // SAFETY: the caller keeps the rules of the true function.
    unsafe { *version = 23_000 };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> c_int {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "ring-stub-{}-{}",
        process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    let mut bytes = [0; ID_BYTES];
    for (byte, letter) in bytes.iter_mut().zip(name.bytes()) {
        *byte = letter as c_char;
    }
    // SAFETY: the caller keeps the rules of the true function.
    unsafe { *id = UniqueId(bytes) };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetErrorString(_code: c_int) -> *const c_char {
    c"an error of the stub".as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetLastError(_communicator: *const Communicator) -> *const c_char {
    c"".as_ptr()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclCommInitRankConfig(
    handle: *mut *const Communicator,
    world_size: c_int,
    id: UniqueId,
    rank: c_int,
    config: *const Config,
) -> c_int {
    cuda::require_context("ncclCommInitRankConfig");
    // SAFETY: the caller keeps the rules of the true function.
    let (config, name) = unsafe { (&*config, CStr::from_ptr(id.0.as_ptr())) };
    if config.magic != MAGIC
        || config.blocking != 0
        || config.size < size_of::<Config>()
        || config.version == 0
    {
        refuse("a configuration that is none, or of calls that block");
    }
    let communicator = Arc::new(Communicator {
        name: name.to_string_lossy().into_owned(),
        rank,
        state: AtomicI32::new(IN_PROGRESS),
        is_aborted: AtomicBool::new(false),
        incoming: Mutex::default(),
        outgoing: Mutex::default(),
    });
    let listening = Arc::clone(&communicator);
    thread::spawn(move || listening.listen(world_size));
    // SAFETY: as above.
    unsafe { *handle = Arc::into_raw(communicator) };
    IN_PROGRESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclCommGetAsyncError(handle: *const Communicator, code: *mut c_int) -> c_int {
    // SAFETY: the caller keeps the rules of the true function.
    unsafe { *code = communicator(handle).state.load(Ordering::Acquire) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclCommFinalize(handle: *const Communicator) -> c_int {
    // SAFETY: the caller keeps the rules of the true function.
    let communicator = unsafe { communicator(handle) };
    communicator.state.store(IN_PROGRESS, Ordering::Release);
    thread::spawn(move || communicator.state.store(SUCCESS, Ordering::Release));
    IN_PROGRESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclCommDestroy(handle: *const Communicator) -> c_int {
    // SAFETY: the caller keeps the rules of the true function.
    unsafe { ncclCommAbort(handle) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclCommAbort(handle: *const Communicator) -> c_int {
    // SAFETY: the caller keeps the rules of the true function, and does not use the handle after this.
    let communicator = unsafe { Arc::from_raw(handle) };
    communicator.is_aborted.store(true, Ordering::Release);
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupStart() -> c_int {
    GROUP.with_borrow_mut(|group| group.depth += 1);
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupEnd() -> c_int {
    let Group { halves, target, .. } = GROUP.take();
    let Some((communicator, stream)) = target else {
        return SUCCESS;
    };
    communicator.state.store(IN_PROGRESS, Ordering::Release);
    thread::spawn(move || {
        let running = Arc::clone(&communicator);
        stream.put(move || running.run(&halves));
        communicator.state.store(SUCCESS, Ordering::Release);
    });
    IN_PROGRESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclSend(
    address: *const c_void,
    count: usize,
    _type: c_int,
    peer: c_int,
    handle: *const Communicator,
    stream: *mut c_void,
) -> c_int {
    let half = Half {
        is_send: true,
        address: address.expose_provenance() as u64,
        bytes: count,
        peer,
    };
    // SAFETY: the caller keeps the rules of the true function.
    unsafe { add(half, handle, stream) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclRecv(
    address: *mut c_void,
    count: usize,
    _type: c_int,
    peer: c_int,
    handle: *const Communicator,
    stream: *mut c_void,
) -> c_int {
    let half = Half {
        is_send: false,
        address: address.expose_provenance() as u64,
        bytes: count,
        peer,
    };
    // SAFETY: the caller keeps the rules of the true function.
    unsafe { add(half, handle, stream) }
}

/// # Safety
/// The communicator and the stream are there.
unsafe fn add(half: Half, handle: *const Communicator, stream: *mut c_void) -> c_int {
    // SAFETY: as promised.
    let (communicator, stream) = unsafe { (communicator(handle), cuda::stream(stream)) };
    if communicator.state.load(Ordering::Acquire) != SUCCESS {
        refuse("a call on a communicator that is busy");
    }
    GROUP.with_borrow_mut(|group| {
        if group.depth == 0 {
            refuse("a half outside of a group");
        }
        group.halves.push(half);
        group.target = Some((communicator, stream));
    });
    SUCCESS
}
