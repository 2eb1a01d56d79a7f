//! The driver: one device, streams, events, memory.

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    ffi::{c_char, c_int, c_uint, c_void},
    ptr, slice,
    sync::{Arc, Condvar, LazyLock, Mutex},
    thread,
};

use crate::{SUCCESS, refuse};

const NOT_READY: c_int = 600;
/// Any address that is not null.
const CONTEXT: *mut c_void = ptr::dangling_mut();

type Task = Box<dyn FnOnce() + Send>;

/// Does one thing after the other, on a thread of its own.
#[derive(Default)]
pub(crate) struct Stream {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    is_over: bool,
}

/// Whether the point is reached.
#[derive(Default)]
struct Event {
    is_reached: Mutex<bool>,
    changed: Condvar,
}

/// What is allocated, by address.
static MEMORY: LazyLock<Mutex<HashMap<u64, Box<[u8]>>>> = LazyLock::new(Mutex::default);

thread_local! {
    static CONTEXTS: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

impl Stream {
    fn start() -> Arc<Self> {
        let stream = Arc::new(Self::default());
        let worker = Arc::clone(&stream);
        thread::spawn(move || {
            while let Some(task) = worker.next() {
                task();
            }
        });
        stream
    }

    fn next(&self) -> Option<Task> {
        let queue = self.queue.lock().unwrap();
        let is_quiet = |queue: &mut Queue| queue.tasks.is_empty() && !queue.is_over;
        let mut queue = self.changed.wait_while(queue, is_quiet).unwrap();
        queue.tasks.pop_front()
    }

    pub(crate) fn put(&self, task: impl FnOnce() + Send + 'static) {
        self.queue.lock().unwrap().tasks.push_back(Box::new(task));
        self.changed.notify_all();
    }

    fn end(&self) {
        self.queue.lock().unwrap().is_over = true;
        self.changed.notify_all();
    }
}

impl Event {
    fn set(&self, is_reached: bool) {
        *self.is_reached.lock().unwrap() = is_reached;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let is_reached = self.is_reached.lock().unwrap();
        drop(
            self.changed
                .wait_while(is_reached, |is_reached| !*is_reached)
                .unwrap(),
        );
    }
}

/// # Safety
/// The handle is one of this library that is not destroyed.
pub(crate) unsafe fn stream(handle: *mut c_void) -> Arc<Stream> {
    // SAFETY: as promised, it came from an `Arc`, of which the handle keeps one.
    unsafe { shared(handle) }
}

/// # Safety
/// As for [`stream`], of that type.
unsafe fn shared<T>(handle: *mut c_void) -> Arc<T> {
    let pointer: *const T = handle.cast();
    // SAFETY: as promised.
    unsafe {
        Arc::increment_strong_count(pointer);
        Arc::from_raw(pointer)
    }
}

/// The calling thread has a current context.
pub(crate) fn require_context(call: &str) {
    let current = CONTEXTS.with_borrow(|contexts| contexts.last().copied());
    if current.is_none_or(|context| context == 0) {
        refuse(&format!("{call} without a current context"));
    }
}

/// Defines a function of the library, which may write through the pointers it gets.
macro_rules! exported {
    ($($name:ident($($argument:ident: $type:ty),*) $body:block)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
            // SAFETY: the caller keeps the rules of the true function.
            #[allow(unused_unsafe)]
            unsafe { $body }
            #[allow(unreachable_code)]
            SUCCESS
        }
    )*};
}

exported! {
    cuInit(_flags: c_uint) {}
    cuDriverGetVersion(version: *mut c_int) { *version = 13_000; }
    cuDeviceGetCount(count: *mut c_int) { *count = 1; }
    cuDeviceGet(device: *mut c_int, ordinal: c_int) { *device = ordinal; }
    cuDeviceGetAttribute(value: *mut c_int, _attribute: c_int, _device: c_int) { *value = 1; }
    cuDevicePrimaryCtxRetain(context: *mut *mut c_void, _device: c_int) { *context = CONTEXT; }
    cuDevicePrimaryCtxRelease_v2(_device: c_int) {}
    cuCtxPushCurrent_v2(context: *mut c_void) {
        CONTEXTS.with_borrow_mut(|contexts| contexts.push(context.addr()));
    }
    cuCtxPopCurrent_v2(_context: *mut *mut c_void) {
        if CONTEXTS.with_borrow_mut(Vec::pop).is_none() {
            refuse("no context to pop");
        }
    }
    cuCtxSetCurrent(context: *mut c_void) {
        CONTEXTS.with_borrow_mut(|contexts| {
            contexts.pop();
            contexts.push(context.addr());
        });
    }
    cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) {
        require_context("cuCtxGetStreamPriorityRange");
        *least = 0;
        *greatest = -5;
    }
    cuStreamCreate(stream: *mut *mut c_void, _flags: c_uint) {
        require_context("cuStreamCreate");
        *stream = Arc::into_raw(Stream::start()).cast_mut().cast();
    }
    cuStreamCreateWithPriority(stream: *mut *mut c_void, flags: c_uint, _priority: c_int) {
        return cuStreamCreate(stream, flags);
    }
    cuStreamDestroy_v2(stream: *mut c_void) {
        let stream: Arc<Stream> = Arc::from_raw(stream.cast_const().cast());
        stream.end();
    }
    cuStreamWaitEvent(on: *mut c_void, event: *mut c_void, _flags: c_uint) {
        let event: Arc<Event> = shared(event);
        stream(on).put(move || event.wait());
    }
    cuEventCreate(event: *mut *mut c_void, _flags: c_uint) {
        require_context("cuEventCreate");
        *event = Arc::into_raw(Arc::new(Event::default())).cast_mut().cast();
    }
    cuEventRecord(event: *mut c_void, on: *mut c_void) {
        require_context("cuEventRecord");
        let event: Arc<Event> = shared(event);
        event.set(false);
        stream(on).put(move || event.set(true));
    }
    cuEventQuery(event: *mut c_void) {
        let event: Arc<Event> = shared(event);
        if !*event.is_reached.lock().unwrap() {
            return NOT_READY;
        }
    }
    cuEventDestroy_v2(event: *mut c_void) {
        let event: Arc<Event> = Arc::from_raw(event.cast_const().cast());
        drop(event);
    }
    cuMemAllocAsync(pointer: *mut u64, bytes: usize, _on: *mut c_void) {
        require_context("cuMemAllocAsync");
        let memory = vec![0x5a; bytes].into_boxed_slice();
        *pointer = memory.as_ptr().expose_provenance() as u64;
        MEMORY.lock().unwrap().insert(*pointer, memory);
    }
    cuMemFreeAsync(pointer: u64, on: *mut c_void) {
        require_context("cuMemFreeAsync");
        let Some(mut memory) = MEMORY.lock().unwrap().remove(&pointer) else {
            refuse("memory freed that is not allocated");
        };
        // Whoever still uses it shall see.
        stream(on).put(move || memory.fill(0xdd));
    }
    cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, on: *mut c_void) {
        require_context("cuMemcpyHtoDAsync");
        let from = from.expose_provenance() as u64;
        stream(on).put(move || copy(from, to, bytes));
    }
    cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, on: *mut c_void) {
        require_context("cuMemcpyDtoHAsync");
        let to = to.expose_provenance() as u64;
        stream(on).put(move || copy(from, to, bytes));
    }
    cuGetErrorName(_error: c_int, name: *mut *const c_char) { *name = c"STUB".as_ptr(); }
    cuGetErrorString(_error: c_int, text: *mut *const c_char) { *text = c"an error of the stub".as_ptr(); }
}

/// The caller of the copy promised that the memory is there.
fn copy(from: u64, to: u64, bytes: usize) {
    // SAFETY: as promised.
    let (from, to) = unsafe { (readable(from, bytes), writable(to, bytes)) };
    to.copy_from_slice(from);
}

/// # Safety
/// So many bytes lie there, and nobody writes them meanwhile.
pub(crate) unsafe fn readable<'a>(address: u64, bytes: usize) -> &'a [u8] {
    // SAFETY: as promised.
    unsafe { slice::from_raw_parts(ptr::with_exposed_provenance(address as usize), bytes) }
}

/// # Safety
/// So many bytes lie there, and nobody else uses them meanwhile.
pub(crate) unsafe fn writable<'a>(address: u64, bytes: usize) -> &'a mut [u8] {
    // SAFETY: as promised.
    unsafe { slice::from_raw_parts_mut(ptr::with_exposed_provenance_mut(address as usize), bytes) }
}
