#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""pod.py: what runs in the pods, and its counterpart for UDP.

  pod.py serve NAME FILE     HTTP on port 8080 and UDP echo on port 9090, both families.
                             GET /      "NAME CLIENT-ADDRESS"
                             GET /file  FILE
                             PUT        "NAME CLIENT-ADDRESS SHA256-OF-THE-BODY"
                             UDP        "NAME CLIENT-ADDRESS PAYLOAD", PAYLOAD cut to make
                                        the answer as long as the question, if that is longer
  pod.py ask ADDRESS PORT FROM N [LENGTH]
                             ask by UDP from N ports, FROM and those above it, one after
                             another: one answer a line; LENGTH is the payload's. Exit 1
                             if one stays away.
"""
import hashlib
import http.server
import shutil
import socket
import sys
import threading


def plain(address):
    return address[7:] if address.startswith("::ffff:") else address


class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True

    def server_bind(self):  # no look-up of our own name, which waits for a DNS that is not there
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socket.socket.setsockopt(self.socket, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, *words):
        body = (" ".join((name, plain(self.client_address[0])) + words) + "\n").encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path != "/file":
            return self.answer()
        with open(file, "rb") as source:
            self.send_response(200)
            self.end_headers()
            shutil.copyfileobj(source, self.wfile)

    def do_PUT(self):
        seen, left = hashlib.sha256(), int(self.headers["Content-Length"])
        while left and (piece := self.rfile.read(min(left, 1 << 16))):
            seen.update(piece)
            left -= len(piece)
        self.answer(seen.hexdigest())

    def log_message(self, *_):
        pass


def echo():
    s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    s.bind(("::", 9090))
    while True:
        data, peer = s.recvfrom(65536)
        head = f"{name} {plain(peer[0])} ".encode()
        s.sendto((head + data)[: max(len(data), len(head))], peer)


def ask(address, port, first, n, length=0):
    family = socket.getaddrinfo(address, None)[0][0]
    payload = bytes(range(97, 123)) * (length // 26 + 1)
    for source in range(first, first + n):
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.settimeout(2)
            s.bind(("", source))
            s.connect((address, port))
            s.send(payload[:length])
            try:
                print(s.recv(65536).decode())
            except OSError as error:
                sys.exit(f"{address} port {port}: {error}")


if sys.argv[1] == "serve":
    name, file = sys.argv[2:4]
    threading.Thread(target=echo, daemon=True).start()
    Server(("::", 8080), Handler).serve_forever()
else:
    ask(sys.argv[2], *map(int, sys.argv[3:]))
