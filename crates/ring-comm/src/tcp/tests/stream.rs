//! Both directions of a connection, over a stream that is cut anywhere.

use std::{
    collections::VecDeque,
    io::{self, ErrorKind, Read, Write},
};

use proptest::prelude::*;

use crate::{
    buffer::{DType, HostBuffer},
    tcp::{
        incoming::{Arrival, Incoming, ReadError, Rest},
        outgoing::{Departure, Outgoing},
        record::{HEADER_BYTES, MAX_FRAME_BYTES, Record, RecordError},
    },
};

/// Takes and gives as many bytes at once as its cuts say, over and over; 0 is a moment in which nothing goes.
struct Pipe {
    bytes: VecDeque<u8>,
    cuts: Vec<usize>,
    writes: usize,
    reads: usize,
}

impl Pipe {
    fn new(cuts: Vec<usize>) -> Self {
        Self {
            bytes: VecDeque::new(),
            cuts,
            writes: 0,
            reads: 0,
        }
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writes += 1;
        let cut = self.cuts[self.writes % self.cuts.len()];
        let len = cut.min(bytes.len());
        if len == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        self.bytes.extend(&bytes[..len]);
        Ok(len)
    }

    fn write_vectored(&mut self, slices: &[io::IoSlice<'_>]) -> io::Result<usize> {
        let all: Vec<u8> = slices.iter().flat_map(|slice| slice.to_vec()).collect();
        self.write(&all)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Pipe {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        assert!(!bytes.is_empty(), "no room to read into");
        self.reads += 1;
        let cut = self.cuts[self.reads % self.cuts.len()];
        let len = cut.min(bytes.len()).min(self.bytes.len());
        if len == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        for (place, byte) in bytes.iter_mut().zip(self.bytes.drain(..len)) {
            *place = byte;
        }
        Ok(len)
    }
}

/// What one side does.
#[derive(Clone, Debug)]
enum Step {
    Frame(Vec<u8>),
    /// Data of so many elements.
    Data(usize),
    /// The other side gives memory for the oldest data that it has not given any for.
    Receive,
    /// Bytes move.
    Flow,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..300).prop_map(Step::Frame),
        (0..200usize).prop_map(Step::Data),
        Just(Step::Receive),
        Just(Step::Flow),
    ]
}

fn cuts() -> impl Strategy<Value = Vec<usize>> {
    let cut = prop_oneof![0..3usize, 0..40usize, Just(10_000)];
    prop::collection::vec(cut, 1..20).prop_filter("something must flow", |cuts| {
        cuts.iter().any(|&cut| cut > 0)
    })
}

fn message(sequence: u64, len: usize) -> HostBuffer {
    HostBuffer::F32(
        (0..len)
            .map(|index| (sequence * 1000) as f32 + index as f32)
            .collect(),
    )
}

/// One sends, the other receives and asks.
struct Pair {
    there: Pipe,
    back: Pipe,
    sender: (Outgoing, Incoming),
    receiver: (Outgoing, Incoming),
    arrivals: Vec<Arrival>,
    departures: Vec<Departure>,
}

impl Pair {
    fn flow(&mut self, budget: usize) {
        let (outgoing, incoming) = &mut self.sender;
        outgoing
            .write(&mut self.there, budget, &mut self.departures)
            .unwrap();
        self.receiver
            .1
            .read(&mut self.there, budget, &mut self.arrivals)
            .unwrap();
        self.receiver
            .0
            .write(&mut self.back, budget, &mut Vec::new())
            .unwrap();
        let mut asked = Vec::new();
        incoming.read(&mut self.back, budget, &mut asked).unwrap();
        for arrival in asked {
            match arrival {
                Arrival::Asked { sequence } => outgoing.asked_for(sequence),
                other => panic!("{other:?}"),
            }
        }
    }
}

proptest! {
    /// Wherever the streams are cut: frames come whole, once and in order; data that was asked for comes whole and once,
    /// into the memory given for it, and its own memory comes back.
    #[test]
    fn records_come_out_as_they_went_in(
        steps in prop::collection::vec(step(), 0..40),
        there in cuts(),
        back in cuts(),
        piece in 1..300usize,
        budget in 1..2000usize,
    ) {
        let ends = || (Outgoing::new(piece), Incoming::new());
        let mut pair = Pair {
            there: Pipe::new(there),
            back: Pipe::new(back),
            sender: ends(),
            receiver: ends(),
            arrivals: Vec::new(),
            departures: Vec::new(),
        };
        let (mut frames, mut lens, mut given) = (Vec::new(), Vec::new(), 0);
        for step in steps {
            match step {
                Step::Frame(bytes) => {
                    pair.sender.0.frame(bytes.clone());
                    frames.push(bytes);
                }
                Step::Data(len) => {
                    pair.sender.0.data(lens.len() as u64, message(lens.len() as u64, len));
                    lens.push(len);
                }
                Step::Receive if given < lens.len() => {
                    let memory = HostBuffer::zeros(DType::F32, lens[given]);
                    pair.receiver.1.expect(given as u64, memory);
                    pair.receiver.0.ask(given as u64);
                    given += 1;
                }
                Step::Receive => {}
                Step::Flow => pair.flow(budget),
            }
        }
        let is_settled = |pair: &Pair| {
            let is_flushed = pair.sender.0.is_flushed() && pair.receiver.0.is_flushed();
            is_flushed && pair.there.bytes.is_empty() && pair.back.bytes.is_empty()
        };
        let mut rounds = 0;
        while !is_settled(&pair) {
            pair.flow(budget);
            rounds += 1;
            prop_assert!(rounds < 1_000_000, "it never ends");
        }

        let (mut heard, mut received) = (Vec::new(), Vec::new());
        for arrival in pair.arrivals {
            match arrival {
                Arrival::Frame(bytes) => heard.push(bytes),
                Arrival::Data { sequence, buffer } => received.push((sequence, buffer)),
                Arrival::Asked { .. } => panic!("nobody asks here"),
            }
        }
        prop_assert_eq!(heard, frames);
        let expected: Vec<_> = (0..given as u64).map(|number| (number, message(number, lens[number as usize]))).collect();
        let sent: Vec<_> = pair.departures.into_iter().map(|Departure { sequence, buffer }| (sequence, buffer)).collect();
        prop_assert_eq!(&received, &expected);
        prop_assert_eq!(&sent, &expected);
        prop_assert_eq!(pair.sender.0.has_data(), given < lens.len());
        prop_assert!(!pair.receiver.1.is_expecting());
    }

    /// Noise is an error or something else to read, but never a panic, and takes no memory that it has not brought.
    #[test]
    fn noise_is_no_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        kind in 1..5u8,
        cuts in cuts(),
    ) {
        let mut pipe = Pipe::new(cuts);
        // As if it were a record, or it would be found out at once.
        pipe.bytes.extend([kind, b'N', b'I', b'R']);
        pipe.bytes.extend(bytes);
        let mut incoming = Incoming::new();
        incoming.expect(0, HostBuffer::zeros(DType::F32, 10));
        for _ in 0..10_000 {
            if pipe.bytes.is_empty() || incoming.read(&mut pipe, 100, &mut Vec::new()).is_err() {
                break;
            }
        }
    }
}

fn read(bytes: &[u8], incoming: &mut Incoming) -> (Result<Rest, ReadError>, Vec<Arrival>) {
    let mut arrivals = Vec::new();
    let result = incoming.read(&mut &*bytes, usize::MAX, &mut arrivals);
    (result, arrivals)
}

fn record_error(bytes: &[u8], incoming: &mut Incoming) -> RecordError {
    match read(bytes, incoming).0 {
        Err(ReadError::Malformed(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_no_record_is_an_error() {
    let mut incoming = Incoming::new();
    assert_eq!(
        record_error(b"GET / HTTP/1.1\r\n\r\n", &mut incoming),
        RecordError::Kind(u32::from_le_bytes(*b"GET "))
    );
    let mut header = Record::Frame { len: 0 }.header();
    header[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(
        record_error(&header, &mut Incoming::new()),
        RecordError::TooLong {
            len: u32::MAX as usize,
            limit: MAX_FRAME_BYTES
        }
    );
}

#[test]
fn data_beyond_its_memory_is_an_error() {
    let mut incoming = Incoming::new();
    incoming.expect(3, HostBuffer::zeros(DType::F32, 2));
    let header = Record::Data {
        sequence: 3,
        len: 9,
    };
    let error = RecordError::TooMuch {
        sequence: 3,
        len: 9,
        missing: 8,
    };
    assert_eq!(record_error(&header.header(), &mut incoming), error);
}

/// The largest frame is announced and never comes.
#[test]
fn an_announced_frame_takes_no_memory() {
    let mut bytes = Record::Frame {
        len: MAX_FRAME_BYTES,
    }
    .header()
    .to_vec();
    bytes.extend([0; 10]);
    let mut incoming = Incoming::new();
    assert!(matches!(
        read(&bytes, &mut incoming).0,
        Err(ReadError::Closed)
    ));
    assert!(incoming.room_len() < 1 << 20, "{}", incoming.room_len());
}

/// What nobody waits for any more is read past, also if it is given up in the middle.
#[test]
fn abandoned_data_is_dropped() {
    let record = Record::Data {
        sequence: 5,
        len: 8,
    };
    let mut bytes = record.header().to_vec();
    bytes.extend([1; 8]);
    let frame = Record::Frame { len: 2 };
    bytes.extend(frame.header());
    bytes.extend(*b"ok");

    let mut incoming = Incoming::new();
    incoming.expect(5, HostBuffer::zeros(DType::F32, 2));
    let (first, rest) = bytes.split_at(HEADER_BYTES + 3);
    assert_eq!(read(first, &mut incoming).1, []);
    assert!(incoming.is_expecting());
    incoming.abandon();
    assert!(!incoming.is_expecting());
    assert_eq!(
        read(rest, &mut incoming).1,
        [Arrival::Frame(b"ok".to_vec())]
    );
}

/// A frame waits for the piece that is being written, and for no more.
#[test]
fn frames_go_between_pieces() {
    let mut outgoing = Outgoing::new(8);
    outgoing.data(0, message(0, 6));
    outgoing.asked_for(0);
    let mut departures = Vec::new();
    let mut bytes = Vec::new();
    outgoing.write(&mut bytes, 1, &mut departures).unwrap();
    outgoing.frame(b"poison".to_vec());
    outgoing
        .write(&mut bytes, usize::MAX, &mut departures)
        .unwrap();
    assert_eq!(departures.len(), 1);

    let mut incoming = Incoming::new();
    incoming.expect(0, HostBuffer::zeros(DType::F32, 6));
    let (_, arrivals) = read(&bytes, &mut incoming);
    let poison = Arrival::Frame(b"poison".to_vec());
    assert_eq!(
        arrivals.iter().position(|arrival| *arrival == poison),
        Some(0)
    );
    let at = HEADER_BYTES + 8;
    let header = Record::Frame { len: 6 }.header();
    assert_eq!(bytes[at..at + HEADER_BYTES], header);
}

/// The piece that is being written is written to its end, and nothing of the message after it.
#[test]
fn what_is_abandoned_on_its_way_leaves_the_stream_sound() {
    let mut pipe = Pipe::new(vec![0, 20]);
    let mut outgoing = Outgoing::new(8);
    let mut departures = Vec::new();
    outgoing.data(0, message(0, 6));
    outgoing.data(1, message(1, 6));
    outgoing.asked_for(0);
    outgoing
        .write(&mut pipe, usize::MAX, &mut departures)
        .unwrap();
    assert_eq!(pipe.bytes.len(), 20, "in the middle of a piece");
    outgoing.abandon();
    assert!(!outgoing.is_flushed());
    outgoing.frame(b"next".to_vec());
    while !outgoing.is_flushed() {
        outgoing
            .write(&mut pipe, usize::MAX, &mut departures)
            .unwrap();
    }
    assert!(departures.is_empty() && !outgoing.has_data());
    let bytes: Vec<u8> = pipe.bytes.into_iter().collect();
    let mut incoming = Incoming::new();
    assert_eq!(
        read(&bytes, &mut incoming).1,
        [Arrival::Frame(b"next".to_vec())]
    );
}
