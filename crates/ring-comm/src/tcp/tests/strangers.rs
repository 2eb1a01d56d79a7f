//! Who does not belong to the job is not let in, and disturbs nobody.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
};

use super::*;
use crate::{
    launch::store::{
        HANDSHAKE_DEADLINE, MAX_STRANGERS,
        connection::Timed,
        handshake::{self, AskError, Verdict},
        wire::write_frame,
    },
    tcp::{
        door::Door,
        mesh::{Meeting, PROTOCOL},
    },
};

/// As who a rank comes, by its number and the number of ranks.
type As<'a> = &'a dyn Fn(Rank, usize) -> Membership;

/// Rank 1 of a job, at whose door `knock` is called with its address. Returns how many it has let in. What `knock` returns stays.
fn at_the_door<T>(
    world_size: usize,
    deadline: Duration,
    knock: impl FnOnce(SocketAddr, As<'_>) -> T,
) -> Result<usize, TcpError> {
    let own = launch(1, world_size, 1);
    let store = serve(&launch(0, 1, 1));
    let meeting = Meeting {
        launch: &own,
        store: &store,
        epoch: [7; 16],
        until: Instant::now() + deadline,
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let door = Door::new(&meeting, &listener);
    thread::scope(|scope| {
        let host = scope.spawn(|| door.let_all_in().map(|streams| streams.len()));
        let _stays = knock(address, &|rank, world_size| {
            let membership = Membership::new(rank, world_size);
            membership.job_id(&meeting.pass(1)).token(Token::new(TOKEN))
        });
        host.join().unwrap()
    })
}

fn ask(address: SocketAddr, membership: &Membership) -> Result<TcpStream, AskError> {
    let stream = TcpStream::connect(address).unwrap();
    let mut timed = Timed::new(&stream, Instant::now() + PATIENT);
    handshake::ask(&mut timed, &PROTOCOL, membership)?;
    Ok(stream)
}

fn refusal(address: SocketAddr, membership: &Membership) -> Verdict {
    match ask(address, membership) {
        Err(AskError::Refused(verdict)) => verdict,
        other => panic!("{other:?}"),
    }
}

#[test]
fn only_ranks_that_are_awaited_are_let_in() {
    let start = Instant::now();
    let let_in = at_the_door(3, PATIENT, |address, of| {
        let guess = of(2, 3).token(Token::new("guess"));
        assert_eq!(refusal(address, &guess), Verdict::WrongToken);
        let expected = 3;
        assert_eq!(
            refusal(address, &of(2, 4)),
            Verdict::WrongWorldSize { expected }
        );
        assert_eq!(refusal(address, &of(3, 3)), Verdict::RankOutOfRange);
        // Rank 1 goes to that, not the other way round.
        assert_eq!(refusal(address, &of(0, 3)), Verdict::RankOutOfRange);
        // Of another epoch, or on its way to another rank.
        let elsewhere = of(2, 3).job_id("another");
        let verdict = refusal(address, &elsewhere);
        assert!(matches!(verdict, Verdict::WrongJob { .. }), "{verdict}");
        // One says something else, many say nothing.
        let mut noise = TcpStream::connect(address).unwrap();
        noise.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        // Closed or reset, without an answer.
        let _ = noise.read_to_end(&mut answer);
        assert!(answer.is_empty());
        let connect = |_| TcpStream::connect(address).unwrap();
        let silent: Vec<_> = (0..MAX_STRANGERS / 2).map(connect).collect();
        ask(address, &of(2, 3)).unwrap();
        silent
    });
    assert_eq!(let_in, Ok(1));
    assert!(
        start.elapsed() < HANDSHAKE_DEADLINE,
        "it waited for the silent"
    );
}

#[test]
fn a_rank_is_let_in_once() {
    let let_in = at_the_door(4, PATIENT, |address, of| {
        let _two = ask(address, &of(2, 4)).unwrap();
        assert_eq!(refusal(address, &of(2, 4)), Verdict::DuplicateRank);
        let _three = ask(address, &of(3, 4)).unwrap();
    });
    assert_eq!(let_in, Ok(2));
}

#[test]
fn who_never_comes_is_named() {
    let deadline = Duration::from_millis(50);
    let error = at_the_door(4, deadline, |address, of| {
        ask(address, &of(2, 4)).unwrap();
    });
    let absent = TcpError::Absent {
        rank: 1,
        missing: vec![3],
        deadline: PATIENT,
    };
    assert_eq!(error, Err(absent));
}

/// Lets everybody in, without knowing the token.
#[test]
fn an_impostor_is_found_out() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut hello = [0; 44];
            stream.read_exact(&mut hello).unwrap();
            stream.write_all(&hello).unwrap();
            let mut len = [0; 4];
            stream.read_exact(&mut len).unwrap();
            let mut join = vec![0; u32::from_le_bytes(len) as usize];
            stream.read_exact(&mut join).unwrap();
            write_frame(&mut stream, &Verdict::Welcome { proof: [0; 32] }).unwrap();
        });
        let pass = Membership::new(1, 2).job_id("pass");
        let error = ask(address, &pass.token(Token::new(TOKEN))).unwrap_err();
        assert!(matches!(error, AskError::Impostor), "{error}");
    });
}
