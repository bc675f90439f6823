// SPDX-License-Identifier: MIT
/* world.c: what the demo and the namespace tests need around tail_lifter.
 *
 *   world tun NETNS/NAME NETNS/NAME   a TUN in each namespace, what goes into one comes
 *                                     out of the other, offloads and all: the tailnet;
 *                                     SIGHUP destroys the second and makes it again
 *   world pod NAME PORT               answers HTTP, lines by TCP, and UDP: with its name
 *                                     and the address of whoever asked; lines and UDP
 *                                     also with "port PORT " and what was asked
 *   world echo PORT                   sends back what comes, TCP and UDP
 *   world load FILE PORT ADDRESS...   numbered messages to such echoes until SIGTERM; then
 *                                     FILE tells what was sent and what did not come back
 *
 * All stay until they are killed or whoever started them is gone.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <linux/if_tun.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t hup, term;

static void on_hup(int sig)
{
	(void)sig;
	hup = 1;
}

static void on_term(int sig)
{
	(void)sig;
	term = 1;
}

/* A TUN as tailscaled makes it: bare IP, with offloads. */
static int tun_open(const char *where)
{
	struct ifreq ifr = { .ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR };
	const char *name = strchr(where, '/');
	char path[256];
	int ns, fd;

	if (!name++)
		errx(1, "not NETNS/NAME: %s", where);
	snprintf(path, sizeof(path), "/run/netns/%.*s", (int)(name - 1 - where), where);
	ns = open(path, O_RDONLY);
	if (ns < 0 || setns(ns, CLONE_NEWNET))
		err(1, "%s", path);
	close(ns);
	fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
	snprintf(ifr.ifr_name, sizeof(ifr.ifr_name), "%s", name);
	if (fd < 0 || ioctl(fd, TUNSETIFF, &ifr) ||
	    ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6))
		err(1, "/dev/net/tun: %s", name);
	return fd;
}

static void carry(int from, int to)
{
	static char packet[65536 + 64];
	ssize_t n;

	for (int i = 0; i < 64 && (n = read(from, packet, sizeof(packet))) > 0; i++)
		if (write(to, packet, n) < 0 && errno != EIO && errno != EAGAIN && errno != EINVAL)
			err(1, "write to a TUN"); /* EIO: it is not up yet; then it is as if lost */
}

static int tun(char **arg)
{
	struct pollfd p[2] = { { .events = POLLIN }, { .events = POLLIN } };

	p[0].fd = tun_open(arg[0]);
	p[1].fd = tun_open(arg[1]);
	puts("ready");
	fflush(stdout);
	signal(SIGHUP, on_hup);
	while (poll(p, 2, -1) >= 0 || errno == EINTR) {
		for (int i = 0; i < 2; i++)
			if (p[i].revents && !hup)
				carry(p[i].fd, p[!i].fd);
		if (hup) {
			hup = 0;
			close(p[1].fd);
			p[1] = (struct pollfd){ .fd = tun_open(arg[1]), .events = POLLIN };
		}
	}
	return 1;
}

static int listen_on(int type, int port)
{
	struct sockaddr_in6 me = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	int fd = socket(AF_INET6, type, 0), on = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (fd < 0 || bind(fd, (struct sockaddr *)&me, sizeof(me)) ||
	    (type == SOCK_STREAM && listen(fd, 1024)))
		err(1, "port %d", port);
	return fd;
}

/* "NAME answers ADDRESS"; asked something, also "port PORT " and that. */
static int answer(char text[4096], const char *name, const struct sockaddr_in6 *who, const char *asked, size_t n)
{
	char addr[INET6_ADDRSTRLEN];
	int len;

	inet_ntop(AF_INET6, &who->sin6_addr, addr, sizeof(addr));
	len = snprintf(text, 4096, "%s answers %s\n", name, strncmp(addr, "::ffff:", 7) ? addr : addr + 7);
	if (asked)
		len += snprintf(text + len, 4096 - len, "port %d %.*s", ntohs(who->sin6_port), (int)n, asked);
	return len;
}

/* Each line is answered; the longer ones, which are there to be long, by their end. */
static void serve_lines(int fd, const char *name, const struct sockaddr_in6 *who, char *ask, ssize_t n)
{
	char text[4096];
	ssize_t tail;

	do {
		alarm(30);
		tail = n < 64 ? n : 64;
		if (ask[n - 1] == '\n')
			send(fd, text, answer(text, name, who, ask + n - tail, tail), 0);
	} while ((n = read(fd, ask, 65536)) > 0);
}

static void serve_tcp(int listener, const char *name)
{
	struct sockaddr_in6 who;
	socklen_t len = sizeof(who);
	int fd = accept(listener, (struct sockaddr *)&who, &len);
	static char ask[65536], text[4096];
	ssize_t n;

	if (fd < 0 || fork()) {
		close(fd);
		return;
	}
	close(listener);
	alarm(30); /* a client may think for that long */
	n = read(fd, ask, sizeof(ask));
	if (n > 4 && !memcmp(ask, "GET ", 4))
		dprintf(fd, "HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s", answer(text, name, &who, NULL, 0), text);
	else if (n > 0)
		serve_lines(fd, name, &who, ask, n);
	shutdown(fd, SHUT_WR);
	while (read(fd, ask, sizeof(ask)) > 0)
		;
	_exit(0);
}

/* Answers come from the address that was asked: a host may have many. */
static void serve_udp(int fd, const char *name)
{
	char text[4096], in[3500];
	struct sockaddr_in6 who;
	union {
		struct cmsghdr first;
		char room[CMSG_SPACE(sizeof(struct in6_pktinfo))];
	} control;
	struct iovec iov = { in, sizeof(in) };
	struct msghdr msg = { .msg_name = &who, .msg_namelen = sizeof(who), .msg_iov = &iov, .msg_iovlen = 1,
			      .msg_control = &control, .msg_controllen = sizeof(control) };
	ssize_t n = recvmsg(fd, &msg, 0);

	if (n < 0)
		return;
	((struct in6_pktinfo *)CMSG_DATA(&control.first))->ipi6_ifindex = 0; /* by whatever way routes say */
	iov = (struct iovec){ text, answer(text, name, &who, in, n) };
	sendmsg(fd, &msg, 0);
}

static void room_for_bursts(int fd)
{
	int bytes = 8 << 20;

	setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof(bytes));
	setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes));
}

static int pod(char **arg)
{
	struct pollfd p[2] = { { .fd = listen_on(SOCK_STREAM, atoi(arg[1])), .events = POLLIN },
			       { .fd = listen_on(SOCK_DGRAM, atoi(arg[1])), .events = POLLIN } };

	setsockopt(p[1].fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &(int){ 1 }, sizeof(int));
	room_for_bursts(p[1].fd);
	puts("ready");
	fflush(stdout);
	while (poll(p, 2, -1) > 0) {
		if (p[0].revents)
			serve_tcp(p[0].fd, arg[0]);
		if (p[1].revents)
			serve_udp(p[1].fd, arg[0]);
	}
	return 1;
}

static int epoll_on(int epoll_fd, int fd, void *what)
{
	struct epoll_event e = { .events = EPOLLIN, .data.ptr = what };

	if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e))
		err(1, "epoll");
	return fd;
}

static int echo(char **arg)
{
	int listener = listen_on(SOCK_STREAM, atoi(arg[0])), udp = listen_on(SOCK_DGRAM, atoi(arg[0]));
	int epoll_fd = epoll_create1(0), fd, on = 1;
	struct epoll_event e;
	char room[4096];
	ssize_t n;

	room_for_bursts(udp);
	epoll_on(epoll_fd, listener, (void *)(intptr_t)listener);
	epoll_on(epoll_fd, udp, (void *)(intptr_t)udp);
	puts("ready");
	fflush(stdout);
	while (epoll_wait(epoll_fd, &e, 1, -1) > 0) {
		fd = (intptr_t)e.data.ptr;
		if (fd == udp) {
			struct sockaddr_in6 who;
			socklen_t len = sizeof(who);

			n = recvfrom(fd, room, sizeof(room), 0, (struct sockaddr *)&who, &len);
			if (n >= 0)
				sendto(fd, room, n, 0, (struct sockaddr *)&who, len);
		} else if (fd == listener) {
			fd = accept(fd, NULL, NULL);
			if (fd < 0)
				continue;
			setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
			epoll_on(epoll_fd, fd, (void *)(intptr_t)fd);
		} else {
			n = read(fd, room, sizeof(room));
			if (n <= 0 || write(fd, room, n) != n)
				close(fd);
		}
	}
	return 1;
}

/* A client's socket: one of the lasting flows, or a visitor, who sends one message, each
 * time from a new port. */
#define N_LASTING  16	/* of each protocol */
#define MOST_OUT   16	/* messages of a UDP flow under way: a busy machine shall not overflow a queue */
#define LOST_AFTER 1000 /* ms without a word: what is out will not come back */
#define N_VISITORS 1024 /* at a time, of each protocol */
#define TICK	   1	/* ms: a message of each fourth lasting flow; a TCP visitor every tenth time, */
#define TICKS_UDP  50	/* and one by UDP, whose port --snat gives to nobody else for three minutes */

static struct talk {
	int fd; /* 0: none */
	bool tcp, visitor;
	int end;		  /* errno that ended it */
	uint64_t sent, back, lost; /* messages */
	int64_t heard;		  /* when the last came back, or none was out */
	uint64_t due;		  /* the number that comes next */
	uint8_t part[8], n_part;  /* of it */
	int64_t at[64];		  /* when the last messages were sent */
} lasting[2 * N_LASTING], visitors[2 * N_VISITORS];

static struct tally {
	uint64_t sent, missing, broken, garbled;
} tally[2][2]; /* visitor, tcp */
static int64_t longest; /* ms that a UDP message took that did come back */

static void talk_end(struct talk *t)
{
	struct tally *y = &tally[t->visitor][t->tcp];
	struct tcp_info tcp = { 0 };
	socklen_t len = sizeof(tcp);

	if (t->tcp && !getsockopt(t->fd, IPPROTO_TCP, TCP_INFO, &tcp, &len) && tcp.tcpi_total_retrans)
		fprintf(stderr, "%jd: a %s by TCP had said something twice\n", (intmax_t)time(NULL),
			t->visitor ? "visitor" : "flow that lasts");
	y->sent += t->sent;
	y->missing += t->sent - t->back;
	y->broken += t->end != 0;
	if (t->fd)
		close(t->fd);
	*t = (struct talk){ 0 };
}

static void talk_begin(struct talk *t, int epoll_fd, bool tcp, bool visitor, const char *to, int port)
{
	struct sockaddr_in6 v6 = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	struct sockaddr_in v4 = { .sin_family = AF_INET, .sin_port = htons(port) };
	bool is6 = inet_pton(AF_INET6, to, &v6.sin6_addr) == 1;
	struct linger at_once = { .l_onoff = 1 };
	int on = 1;

	if (!is6 && inet_pton(AF_INET, to, &v4.sin_addr) != 1)
		errx(1, "not an address: %s", to);
	*t = (struct talk){ .tcp = tcp, .visitor = visitor };
	t->fd = socket(is6 ? AF_INET6 : AF_INET, (tcp ? SOCK_STREAM : SOCK_DGRAM) | SOCK_NONBLOCK, 0);
	if (t->fd < 0)
		err(1, "socket");
	if (tcp)
		setsockopt(t->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	if (tcp && visitor) /* by a RST: no port waits after it */
		setsockopt(t->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
	room_for_bursts(t->fd);
	epoll_on(epoll_fd, t->fd, t);
	if (connect(t->fd, is6 ? (void *)&v6 : (void *)&v4, is6 ? sizeof(v6) : sizeof(v4)) &&
	    errno != EINPROGRESS)
		t->end = errno;
}

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000ll + t.tv_nsec / 1000000;
}

static void talk_send(struct talk *t, int64_t now)
{
	uint64_t out = t->sent - t->back;

	if (!t->fd || t->end)
		return;
	if (!out)
		t->heard = now;
	if (now > t->heard + LOST_AFTER)
		t->lost = out;
	if (!t->tcp && out > t->lost && out - t->lost >= MOST_OUT)
		return;
	t->at[t->sent % 64] = now_ms();
	if (send(t->fd, &t->sent, sizeof(t->sent), MSG_NOSIGNAL) == sizeof(t->sent))
		t->sent++;
	else if (t->tcp && errno != EAGAIN && errno != ENOTCONN)
		t->end = errno; /* UDP that cannot be sent has not been */
}

static void talk_hear(struct talk *t, int64_t now)
{
	uint8_t room[4096];
	ssize_t n;

	t->heard = now;
	while (t->fd && !t->end && (n = read(t->fd, room, t->tcp ? sizeof(room) : 8)) != -1) {
		if (!n && t->tcp)
			t->end = ECONNRESET;
		if (!t->tcp && n == 8) {
			uint64_t number;

			memcpy(&number, room, 8);
			if (number > t->due && !t->visitor)
				fprintf(stderr, "%jd: flow %d: %ju to %ju came not, or late\n", (intmax_t)time(NULL),
					(int)(t - lasting), (uintmax_t)t->due, (uintmax_t)number - 1);
			if (now - t->at[number % 64] > longest)
				longest = now - t->at[number % 64];
			t->due = number + 1;
			t->back++;
		}
		for (ssize_t i = 0; t->tcp && i < n; i++) {
			t->part[t->n_part++] = room[i];
			if (t->n_part < 8)
				continue;
			t->n_part = 0;
			if (memcmp(t->part, &t->due, 8))
				tally[t->visitor][true].garbled++;
			t->due++;
			t->back++;
		}
	}
	if (t->fd && t->tcp && errno != EAGAIN && errno != ENOTCONN && !t->end)
		t->end = errno;
	if (t->end && !t->visitor)
		fprintf(stderr, "%jd: flow %d: ended after %ju: %s\n", (intmax_t)time(NULL), (int)(t - lasting),
			(uintmax_t)t->back, strerror(t->end));
}

static bool talk_waits(const struct talk *t)
{
	return t->fd && !t->end && t->back < t->sent;
}

/* False: nothing came. */
static bool load_hear(int epoll_fd, int timeout)
{
	struct epoll_event e[64];
	int n = epoll_wait(epoll_fd, e, 64, timeout);
	int64_t now = now_ms();

	for (int i = 0; i < n; i++) {
		struct talk *t = e[i].data.ptr;

		if (t->visitor && t->tcp && !t->sent)
			talk_send(t, now);
		talk_hear(t, now);
		if (t->fd && t->visitor && !talk_waits(t) && (t->sent || t->end))
			talk_end(t);
		else if (t->fd && t->end)
			epoll_ctl(epoll_fd, EPOLL_CTL_DEL, t->fd, NULL);
	}
	return n > 0;
}

/* A TCP visitor sends when it is connected. */
static void load_visit(int epoll_fd, unsigned number, bool tcp, const char *to, int port)
{
	struct talk *t = &visitors[tcp * N_VISITORS + number % N_VISITORS];
	struct epoll_event e = { .events = EPOLLIN | (tcp ? EPOLLOUT | EPOLLET : 0), .data.ptr = t };

	if (t->fd) /* it waits since that many visits: seconds */
		talk_end(t);
	talk_begin(t, epoll_fd, tcp, true, to, port);
	if (!tcp)
		talk_send(t, now_ms());
	epoll_ctl(epoll_fd, EPOLL_CTL_MOD, t->fd, &e);
}

static int load(int n, char **arg)
{
	int epoll_fd = epoll_create1(0), port = atoi(arg[1]);
	FILE *f = fopen(arg[0], "w");
	bool waits = true;
	int64_t next;

	if (!f)
		err(1, "%s", arg[0]);
	signal(SIGTERM, on_term);
	for (int i = 0; i < 2 * N_LASTING; i++)
		talk_begin(&lasting[i], epoll_fd, i & 1, false, arg[2 + i / 2 % (n - 2)], port);
	puts("ready");
	fflush(stdout);
	next = now_ms();
	for (unsigned tick = 0; !term; tick++, next += TICK) {
		for (int i = 0; i < 2 * N_LASTING; i++)
			if (i / 8 == (int)tick % 4)
				talk_send(&lasting[i], next);
		for (int tcp = 0, each = TICKS_UDP; tcp < 2; tcp++, each = 10)
			if (tick % each == 0)
				load_visit(epoll_fd, tick / each, tcp, arg[2 + tick / each % (n - 2)], port);
		do
			load_hear(epoll_fd, next + TICK > now_ms() ? next + TICK - now_ms() : 0);
		while (now_ms() < next + TICK);
		if (now_ms() > next + 100) /* we were not let run: not all at once now */
			next = now_ms();
	}
	/* what is still under way; a time without news is long if we were let run in it, often:
	 * a second for UDP, half a minute for a TCP that repeats itself ever more rarely */
	for (int quiet = 0; waits && quiet < 3000; quiet += !load_hear(epoll_fd, 10)) {
		waits = false;
		for (int i = 0; i < 2 * N_LASTING; i++)
			waits |= talk_waits(&lasting[i]) && (lasting[i].tcp || quiet < 100);
		for (int i = 0; i < 2 * N_VISITORS; i++)
			waits |= visitors[i].fd && quiet < 200;
	}
	for (int i = 0; i < 2 * N_LASTING; i++)
		talk_end(&lasting[i]);
	for (int i = 0; i < 2 * N_VISITORS; i++)
		if (visitors[i].fd) {
			visitors[i].sent += !visitors[i].sent; /* its SYN */
			talk_end(&visitors[i]);
		}
	for (int i = 0; i < 4; i++)
		fprintf(f, "%s\"%s_%s\":{\"sent\":%ju,\"missing\":%ju,\"broken\":%ju,\"garbled\":%ju}", i ? "," : "{",
		       i / 2 ? "visitors" : "lasting", i % 2 ? "tcp" : "udp", (uintmax_t)tally[i / 2][i % 2].sent,
		       (uintmax_t)tally[i / 2][i % 2].missing, (uintmax_t)tally[i / 2][i % 2].broken,
		       (uintmax_t)tally[i / 2][i % 2].garbled);
	fprintf(f, ",\"longest_ms\":%jd}\n", (intmax_t)longest);
	return fclose(f) ? 1 : 0;
}

int main(int argc, char **argv)
{
	prctl(PR_SET_PDEATHSIG, SIGTERM);
	signal(SIGPIPE, SIG_IGN);
	signal(SIGCHLD, SIG_IGN);
	if (argc == 4 && !strcmp(argv[1], "tun"))
		return tun(argv + 2);
	if (argc == 4 && !strcmp(argv[1], "pod"))
		return pod(argv + 2);
	if (argc == 3 && !strcmp(argv[1], "echo"))
		return echo(argv + 2);
	if (argc > 4 && !strcmp(argv[1], "load"))
		return load(argc - 2, argv + 2);
	fprintf(stderr, "usage: world tun NETNS/NAME NETNS/NAME | world pod NAME PORT | world echo PORT |\n"
			"       world load FILE PORT ADDRESS...\n");
	return 2;
}
