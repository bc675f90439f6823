# SPDX-License-Identifier: MIT
"""metrics.py WHAT PORT PID: clients of `tail_lifter --metrics` that behave in many ways, and a
strict reader of what it says. Run by tests/netns; exits with a line that says what is wrong."""
import os
import random
import re
import socket
import sys
import time

what, port, pid = sys.argv[1], int(sys.argv[2]), sys.argv[3]
CLIENTS = 8  # WEB_CLIENTS: the agent's at a time


def connect(read=None):
    s = socket.socket()
    if read:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, read)
    s.settimeout(15)
    s.connect(("127.0.0.1", port))
    return s


def rest(s, n=4096):
    out = b""
    while True:
        part = s.recv(n)
        if not part:
            return out
        out += part


def ask(request, end=False):
    """All that comes back; `end`: we say no more."""
    with connect() as s:
        s.sendall(request)
        if end:
            s.shutdown(socket.SHUT_WR)
        return rest(s)


def split(answer):
    """(status, headers, body) of a whole answer."""
    head, found, body = answer.partition(b"\r\n\r\n")
    assert found, answer[:300]
    lines = head.decode("ascii").split("\r\n")
    m = re.fullmatch(r"HTTP/1\.1 (\d{3}) [A-Z][A-Za-z ]+", lines[0])
    assert m, lines[0]
    headers = dict(line.split(": ", 1) for line in lines[1:])
    assert headers["Connection"] == "close", headers
    return int(m[1]), headers, body


def get(path):
    status, headers, body = split(ask(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()))
    assert int(headers["Content-Length"]) == len(body), headers
    return status, headers, body.decode()


def read(text):
    """{(name, label, value of the label): number}; the format, as strictly as we can write it."""
    found, types, last = {}, {}, None
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if m := re.fullmatch(r"# HELP ([a-z_]+) [A-Z].*\.", line):
            assert m[1] not in types, f"twice: {line}"
            types[m[1]], last = None, m[1]
        elif m := re.fullmatch(r"# TYPE ([a-z_]+) (gauge|counter)", line):
            assert m[1] == last and types[last] is None, line
            types[last] = m[2]
        else:
            m = re.fullmatch(r'([a-z_]+)(?:\{([a-z]+)="((?:[^"\\]|\\["\\n])*)"\})? ([0-9]+(?:\.[0-9]+)?)', line)
            assert m and m[1] == last and types[last], line
            assert (m[1].endswith("_total")) == (types[last] == "counter"), line
            assert m.group(1, 2, 3) not in found, f"twice: {line}"
            found[m.group(1, 2, 3)] = float(m[4])
    assert set(types) == {name for name, *_ in found}, "a name without a sample"
    return found


def test_format():
    status, headers, body = get("/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    for key, value in read(body).items():
        print(*[k for k in key if k is not None], value)


# of what is asked, the answer's status; None: the end of the connection tells that it is whole
STATUS = [
    (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 200),
    (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
    (b"GET /healthz HTTP/1.0\n\n", 200),
    (b"GET /healthz?x=1&y HTTP/1.1\r\n\r\n", 200),
    (b"GET /healthz HTTP/1.1\r\n\r\nGET /nosuch HTTP/1.1\r\n\r\n", 200),
    (b"GET /healthz HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 200),
    (b"GET /healthz HTTP/1.1\r\n\r\n" + b"x" * 100000, 200),
    (b"GET / HTTP/1.1\r\n\r\n", 404),
    (b"GET /metrics/ HTTP/1.1\r\n\r\n", 404),
    (b"GET //metrics HTTP/1.1\r\n\r\n", 404),
    (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", 404),
    (b"GET /%s%n HTTP/1.1\r\n\r\n", 404),
    (b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405),
    (b"get /metrics HTTP/1.1\r\n\r\n", 405),
    (b"DELETE /metrics HTTP/1.1\r\n\r\n", 405),
    (b"GET /metrics\r\n\r\n", 400),
    (b"GET  /metrics HTTP/1.1\r\n\r\n", 400),
    (b"GET /metrics  HTTP/1.1\r\n\r\n", 400),
    (b"GET metrics HTTP/1.1\r\n\r\n", 400),
    (b"GET /metrics HTTP/2.0\r\n\r\n", 400),
    (b"GET /metrics HTTP/1.10\r\n\r\n", 400),
    (b"GET /metrics HTTP/1.1\rx\r\n\r\n", 400),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    (b"\r\n\r\n", 400),
    (b"\0", 400),
    (b"GET /\0 HTTP/1.1\r\n\r\n", 400),
    (b"GET /metrics HTTP/1.1\r\nX: \0\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
    (b"GET /healthz HTTP/1.1\r\nX: " + b"y" * 4000 + b"\r\n\r\n", 200),
    (b"GET /healthz HTTP/1.1\r\nX: " + b"y" * 4096 + b"\r\n\r\n", 400),
    (b"GET /" + b"y" * 9000 + b" HTTP/1.1\r\n\r\n", 400),
    (b"GET /" + b"y" * 200000, 400),
]


def test_requests():
    for request, want in STATUS:
        status, headers, body = split(ask(request))
        assert status == want, (request[:80], status)
        assert want == 200 or body.count(b"\n") == 1 and body.endswith(b"\n"), (request[:80], body)
        assert want != 405 or headers["Allow"] == "GET, HEAD", headers
    for request, want in (b"GET /healthz HTTP/1.0\r\n", 200), (b"GET /healthz", 400), (b"GE", 400):
        assert split(ask(request, end=True))[0] == want, request
    assert ask(b"", end=True) == b""


def test_head():
    status, headers, body = split(ask(b"HEAD /metrics HTTP/1.1\r\n\r\n"))
    assert status == 200 and body == b"" and int(headers["Content-Length"]) > 1000, (status, headers, body)


def test_pieces():
    with connect() as s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n":
            s.sendall(bytes([byte]))
            time.sleep(0.002)
        assert split(rest(s))[0] == 200


def test_garbage():
    dice = random.Random(5)
    seen = set()
    for _ in range(3000):
        request = bytearray(dice.choice(STATUS)[0][:5000])
        for _ in range(dice.randrange(1, 6)):
            at = dice.randrange(len(request) + 1)
            change = dice.randrange(4)
            if change == 0:
                request[at:at + 1] = bytes([dice.randrange(256)])
            elif change == 1:
                del request[at:at + dice.randrange(1, 20)]
            elif change == 2:
                request[at:at] = dice.choice([b" ", b"\r", b"\n", b"\r\n\r\n", b"\0", b"/", b"GET "])
            else:
                request[at:at] = request[:dice.randrange(20)]
        answer = ask(bytes(request), end=True)
        status = split(answer)[0] if answer else 0
        assert status in (200, 400, 404, 405) or not request, (request, status)
        seen.add(status)
    assert {200, 400, 404, 405} <= seen, seen
    for _ in range(300):  # who are gone before the answer
        s = connect()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        s.sendall(b"GET /metrics HTTP/1.1\r\n\r\n"[:dice.randrange(26)])
        s.close()
    assert get("/healthz")[0] == 200


def held():
    """What the agent holds: descriptors, and the most memory it ever had, in kB."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", open(f"/proc/{pid}/status").read())
    return len(os.listdir(f"/proc/{pid}/fd")), int(peak[1])


def test_silent():
    """50 that say nothing, and one that never ends: whoever asks is answered, and all are sent
    away in time; meanwhile the agent holds as much as for a few."""
    assert get("/metrics")[0] == 200
    (before, memory), most = held(), 0
    silent = [connect() for _ in range(50)]
    talker, begun = connect(), time.monotonic()
    assert get("/healthz")[0] == 200 and get("/metrics")[0] == 200
    assert time.monotonic() - begun < 8, "they had to wait for the silent ones, who have ten seconds"
    try:
        talker.sendall(b"GET /healthz HTTP/1.1\r\n")
        while time.monotonic() - begun < 15:
            talker.sendall(b"X: y\r\n")
            most = max(most, held()[0])
            time.sleep(0.2)
    except (ConnectionResetError, BrokenPipeError):
        pass
    took = time.monotonic() - begun
    assert 1 < most - before <= CLIENTS, f"{before} descriptors without clients, {most} with them"
    grown = held()[1] - memory
    assert grown <= 200, f"{grown} kB more than ever before"
    assert 9 < took < 12, f"the talker was sent away after {took:.1f} s"
    for s in silent:
        s.setblocking(False)
        try:
            assert s.recv(1) == b""
        except ConnectionResetError:
            pass


def test_slow():
    """One that reads slowly gets all; others are answered meanwhile."""
    with connect(read=1024) as s:
        s.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        time.sleep(0.5)
        assert get("/healthz")[0] == 200
        answer = b""
        while part := s.recv(256):
            answer += part
            time.sleep(0.02)
    status, headers, body = split(answer)
    assert status == 200 and int(headers["Content-Length"]) == len(body), (status, headers, len(body))
    read(body.decode())


globals()["test_" + what]()
