"""A fake API server: lists, watches and streamed lists of four kinds, over TLS or
in the clear, that can be told to misbehave in any way. Only for tests."""
import json, re, socket, ssl, struct, threading, time, urllib.parse

KINDS = {
    "/api/v1/services": ("Service", "v1"),
    "/apis/discovery.k8s.io/v1/endpointslices": ("EndpointSlice", "discovery.k8s.io/v1"),
    "/api/v1/nodes": ("Node", "v1"),
    "/apis/networking.k8s.io/v1/servicecidrs": ("ServiceCIDR", "networking.k8s.io/v1"),
}
REASONS = {200: "OK", 301: "Moved Permanently", 401: "Unauthorized", 403: "Forbidden"}


def answer(body, status=200, type="application/json", chunked=False, headers=(), length=None):
    """The bytes of a whole answer."""
    body = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
    head = [f"HTTP/1.1 {status} {REASONS.get(status, 'Whatever')}", *headers]
    if type:
        head.append(f"Content-Type: {type}")
    if chunked:
        head.append("Transfer-Encoding: chunked")
        body = chunk(body) + chunk(b"") if body else chunk(b"")
    else:
        head.append(f"Content-Length: {len(body) if length is None else length}")
    return ("\r\n".join(head) + "\r\n\r\n").encode() + body


def chunk(body):
    return b"%x\r\n%s\r\n" % (len(body), body)


def status(code, message="", reason="", **more):
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": reason, "code": code, **more}


class Close(Exception):
    """Raised by a script: close this connection now."""


class Request:
    def __init__(self, head):
        first, *lines = head.decode("latin1").split("\r\n")
        self.method, self.target, _ = first.split(" ")
        self.headers = {k.lower(): v for k, _, v in (l.partition(": ") for l in lines)}
        path, _, query = self.target.partition("?")
        self.path = path
        self.query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        self.kind, self.api = KINDS.get(path, (None, None))
        self.watch = self.query.get("watch") in ("true", "1")
        self.stream = self.watch and "sendInitialEvents" in self.query
        self.ask = "stream" if self.stream else "watch" if self.watch else "list"
        self.ended = False  # a watch that is to end, as when its time is over

    def __repr__(self):
        return f"{self.ask} {self.kind} {self.query.get('resourceVersion', '')}"


class Fake:
    """script(fake, request, send) may answer by itself (returns true) or leave it.
    filter(request, bytes) -> list of bytes, seconds to wait, or None (close)."""

    def __init__(self, tls=None, script=None, filter=None, host="127.0.0.1", port=0, rv=100,
                 streams=True, raw=None):
        self.tls, self.script, self.filter, self.raw = tls, script, filter, raw
        self.streams, self.rv = streams, rv
        self.objects = {k: {} for k, _ in KINDS.values()}
        self.events = {k: [] for k, _ in KINDS.values()}
        self.requests, self.sockets, self.closed = [], set(), False
        self.changed = threading.Condition()
        self.listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind((host, port))
        self.listener.listen(64)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Everything ends at once, as when the process is killed."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        try:
            self.listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.listener.close()
        self.drop()

    def drop(self):
        """All connections break."""
        for s in list(self.sockets):
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def end(self, kind):
        """The watches of a kind end, as when their time is over."""
        with self.changed:
            for r in self.requests:
                r.ended |= r.kind == kind
            self.changed.notify_all()

    # --- what is in it

    def hold(self, kind, name, obj):
        """An object that is listed under this name, whatever it is."""
        with self.changed:
            self.objects[kind]["default", name] = obj

    def put(self, kind, obj):
        with self.changed:
            self.rv += 1
            name = (obj["metadata"].get("namespace", ""), obj["metadata"]["name"])
            new = name not in self.objects[kind]
            obj = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self.rv)}}
            self.objects[kind][name] = obj
            self.events[kind].append((self.rv, "ADDED" if new else "MODIFIED", obj))
            self.changed.notify_all()

    def delete(self, kind, ns, name):
        with self.changed:
            self.rv += 1
            obj = self.objects[kind].pop((ns, name))
            obj = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self.rv)}}
            self.events[kind].append((self.rv, "DELETED", obj))
            self.changed.notify_all()

    def event(self, kind, type, obj, rv=None):
        """Any event, also a wrong one; the objects stay what they are."""
        with self.changed:
            self.rv += 1
            self.events[kind].append((rv or self.rv, type, obj))
            self.changed.notify_all()

    # --- the server

    def accept(self):
        while not self.closed:
            try:
                s, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.connection, args=(s,), daemon=True).start()

    def connection(self, s):
        self.sockets.add(s)
        plain = s
        try:
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.raw:
                return self.raw(s)
            if self.tls:
                s = self.tls.wrap_socket(s, server_side=True)
                self.sockets.discard(plain)
                self.sockets.add(s)
            self.serve(s)
        except (OSError, Close):
            pass
        finally:
            self.sockets.discard(s)
            try:
                s.close()
            except OSError:
                pass

    def serve(self, s):
        data = b""
        while not self.closed:
            while b"\r\n\r\n" not in data:
                more = s.recv(65536)
                if not more:
                    return
                data += more
            head, _, data = data.partition(b"\r\n\r\n")
            r = Request(head)
            with self.changed:
                self.requests.append(r)

            def send(b, r=r):
                for piece in self.filter(r, b) if self.filter else [b]:
                    if piece is None:
                        raise Close
                    if isinstance(piece, float):
                        time.sleep(piece)
                    else:
                        s.sendall(piece)

            if self.script and self.script(self, r, send):
                continue
            self.default(r, send)

    def default(self, r, send):
        if not r.kind:
            return send(answer(status(404, "the server could not find the requested resource"), 404))
        if r.stream and not self.streams:
            return send(answer(status(422, "sendInitialEvents: Forbidden", "Invalid"), 422))
        if r.watch:
            return self.watch(r, send)
        with self.changed:
            items = [o for _, o in sorted(self.objects[r.kind].items())]
            meta = {"resourceVersion": str(self.rv)}
        limit, start = int(r.query.get("limit", 0)), int(r.query.get("continue", "at 0/+=").split()[1][:-3])
        if limit and start + limit < len(items):
            meta["continue"] = f"at {start + limit}/+="
        items = items[start : start + limit if limit else None]
        send(answer({"kind": r.kind + "List", "apiVersion": r.api, "metadata": meta, "items": items},
                    chunked=len(items) > 5))

    def watch(self, r, send):
        send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")

        def event(type, obj):
            send(chunk(json.dumps({"type": type, "object": {"kind": r.kind, "apiVersion": r.api, **obj}
                                   if isinstance(obj, dict) else obj}).encode() + b"\n"))

        with self.changed:
            at = int(r.query.get("resourceVersion") or self.rv)
            first = [o for _, o in sorted(self.objects[r.kind].items())] if r.stream else []
        for o in first:
            event("ADDED", o)
        if r.stream:
            event("BOOKMARK", {"metadata": {"resourceVersion": str(at), "annotations": {
                "k8s.io/initial-events-end": "true"}}})
        end = time.monotonic() + int(r.query.get("timeoutSeconds", 3600))
        while time.monotonic() < end and not r.ended:
            with self.changed:
                news = [e for e in self.events[r.kind] if e[0] > at]
                if not news:
                    self.changed.wait(1)
                if self.closed:
                    raise Close
            for rv, type, obj in news:
                event(type, obj)
                at = rv
        send(chunk(b""))


def service(name, ip="10.43.0.10", port=80, ns="default", **meta):
    return {"metadata": {"name": name, "namespace": ns, **meta},
            "spec": {"clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"], "type": "ClusterIP",
                     "ports": [{"name": "http", "port": port, "protocol": "TCP"}]}}


def slice(name, service, *addresses, port=8080, ns="default"):
    return {"metadata": {"name": name, "namespace": ns, "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4", "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
            "endpoints": [{"addresses": [a], "conditions": {"ready": True}} for a in addresses]}


def node(name="n1", zone="z1"):
    return {"metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}}}


def cidr(name="kubernetes", *ranges):
    return {"metadata": {"name": name}, "spec": {"cidrs": list(ranges)}}


def filled(fake, services=2):
    for i in range(services):
        fake.put("Service", service(f"web{i}", f"10.43.{i >> 8}.{i & 255}"))
        fake.put("EndpointSlice", slice(f"web{i}-a", f"web{i}", f"10.42.{i >> 8}.{i & 255}"))
    fake.put("Node", node())
    return fake
