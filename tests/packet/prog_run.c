/* SPDX-License-Identifier: MIT
 *
 * prog_run.c: packets through the programs of a real tail_lifter, by BPF_PROG_TEST_RUN.
 *
 *   prog_run [-q] LIFTER PIN_DIR <VECTORS
 *
 * It makes a network namespace with a TUN (vpn3) and an Ethernet link (vpn2, address
 * 02:00:00:00:00:02), lets
 * LIFTER fill the maps and attach, finds the programs by what LIFTER pinned, and does
 * what the vectors say, a line each:
 *
 *   agent FILE                                run LIFTER --once --from FILE
 *   row NAME DOOR VERDICT COUNTERS IN OUT     one frame; what must come of it
 *   any NAME DOOR IN                          one frame; the rules for bad input hold
 *   put MAP KEY VALUE | delete MAP KEY        an element; KEY need not be there (ct: used
 *                                             when the last flow was)
 *   has MAP KEY yes|no                        is it there?
 *   age MAP KEY SECONDS                       last used that much earlier (ct, aff)
 *   clear                                     no flows, fragments, affinities
 *
 * DOOR is from (ingress) or to (egress), 2 (Ethernet) or 3 (bare IP), and c if the
 * frame has a checksum over all of it in its skb (CHECKSUM_COMPLETE), which must be
 * right afterwards too; kernels before 6.15 cannot say and run it without. COUNTERS are
 * names of TL_REASONS with commas, each goes up by one and no other. Frames, keys and
 * values are hexadecimal; OUT is = for an unchanged frame, - where nobody looks.
 * VERDICT is a number of linux/pkt_cls.h. # begins a comment.
 *
 * Bad input: one reason, the verdict that it has, and nothing written unless the reason
 * is request, reply or icmp_error, and then as long as before; or an answer was sent instead.
 *
 * Prints for each row, any and has: LINE ok|FAIL|refused NAME VERDICT COUNTERS OUT, with
 * -q only failures; `refused` is a frame too short for the kernel to test. At last
 * `N passed, N failed` of rows; exit 1 if something failed. Needs nothing but the
 * kernel, /sys and LIFTER, so it also runs in a virtual machine.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/pkt_cls.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <bpf/bpf.h>
#include <bpf/libbpf.h>

#include "tail_lifter.h"

#ifndef BPF_F_TEST_SKB_CHECKSUM_COMPLETE
#define BPF_F_TEST_SKB_CHECKSUM_COMPLETE (1U << 2) /* Linux 6.15 */
#endif

enum { MAX_FRAME = 4096 }; /* the kernel tests at most about a page */

static const struct {
	const char *name;
	enum { PASS, DROP, REFUSE, ECHO } fate;
} reasons[] = {
#define ENTRY(name, key, fate, text) [TL_##name] = { key, fate },
	TL_REASONS(ENTRY)
};

static const char *lifter, *pin_dir;
static bool quiet;
static int door[2][2]; /* programs by direction (from, to) and link (3, 2) */
static int link_index[2];
static int line, n_passed, n_failed;

/* === maps ================================================================= */
enum map { CT, AFF, FRAG, STAT, SVC, SET, NET, N_MAPS };
static const char *const map_name[N_MAPS] = { "ct", "aff", "frag", "stat", "svc", "set", "net" };
static int map_fd[N_MAPS];

static int pinned(const char *word, int ifindex)
{
	char path[4096];
	int fd;

	if (ifindex)
		snprintf(path, sizeof(path), "%s/%s_%d", pin_dir, word, ifindex);
	else
		snprintf(path, sizeof(path), "%s/%s_map", pin_dir, word);
	fd = bpf_obj_get(path);
	if (fd < 0)
		err(2, "%s", path);
	return fd;
}

static void map_clear(int fd)
{
	char key[256];

	while (!bpf_map_get_next_key(fd, NULL, key))
		if (bpf_map_delete_elem(fd, key))
			err(2, "line %d: clear", line);
}

/* Moves the time of last use back. */
static int map_age(enum map map, const void *key, int seconds)
{
	struct timespec tick;
	struct tl_flow flow;
	struct tl_affinity aff;
	void *value = map == CT ? (void *)&flow : (void *)&aff;
	__u64 *at = map == CT ? &flow.seen : &aff.used;

	clock_getres(CLOCK_MONOTONIC_COARSE, &tick); /* one jiffy */
	if (bpf_map_lookup_elem(map_fd[map], key, value))
		return -1;
	*at -= seconds * (1000000000ULL / tick.tv_nsec);
	return bpf_map_update_elem(map_fd[map], key, value, BPF_EXIST);
}

static __u64 last_use(void)
{
	struct tl_tuple key, *last = NULL;
	struct tl_flow flow;
	__u64 seen = 0;

	for (; !bpf_map_get_next_key(map_fd[CT], last, &key); last = &key)
		if (!bpf_map_lookup_elem(map_fd[CT], &key, &flow) && flow.seen > seen)
			seen = flow.seen;
	return seen;
}

static bool counters_known; /* those after the frame before are those before this one */

/* All counters, summed over CPUs; in one call where the kernel can (5.13). */
static void counters_read(__u64 sum[TL_N_REASONS])
{
	static __u32 keys[TL_MAX_REASONS], at;
	static __u64 *per_cpu;
	static int n;
	__u32 count = TL_MAX_REASONS;

	if (!per_cpu) {
		n = libbpf_num_possible_cpus();
		per_cpu = calloc(n * TL_MAX_REASONS, sizeof(*per_cpu));
	}
	if (bpf_map_lookup_batch(map_fd[STAT], NULL, &at, keys, per_cpu, &count, NULL) &&
	    errno != ENOENT)
		for (__u32 key = 0; key < TL_N_REASONS; key++)
			if (bpf_map_lookup_elem(map_fd[STAT], &key, per_cpu + key * n))
				err(2, "stat_map");
	for (int key = 0; key < TL_N_REASONS; key++) {
		sum[key] = 0;
		for (int i = 0; i < n; i++)
			sum[key] += per_cpu[key * n + i];
	}
}

/* === the agent and its doors ============================================== */
static int link_make(const char *name, int kind)
{
	struct ifreq ifr = { .ifr_flags = kind | IFF_NO_PI };
	int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC); /* the link lives as long as this */

	snprintf(ifr.ifr_name, sizeof(ifr.ifr_name), "%s", name);
	if (fd < 0 || ioctl(fd, TUNSETIFF, &ifr))
		err(2, "/dev/net/tun: %s", name);
	if (kind == IFF_TAP) {
		ifr.ifr_hwaddr.sa_family = ARPHRD_ETHER;
		memcpy(ifr.ifr_hwaddr.sa_data, "\2\0\0\0\0\2", 6);
		if (ioctl(fd, SIOCSIFHWADDR, &ifr))
			err(2, "address of %s", name);
	}
	return if_nametoindex(name);
}

static int run_lifter(const char *command, const char *from)
{
	int status;
	pid_t pid = fork();

	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		dup2(2, 1);
		execl(lifter, lifter, "-q", command, "--pin-dir", pin_dir, "--iface", "vpn2,vpn3",
		      "--node", "node", from ? "--from" : NULL, from, NULL);
		err(2, "%s", lifter);
	}
	return pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status) ?
		WEXITSTATUS(status) :
		-1;
}

/* The program behind a door: pinned itself, or as a tcx link. */
static int door_open(const char *word, int ifindex)
{
	struct bpf_link_info info = { 0 };
	__u32 len = sizeof(info);
	char self[64], what[64] = "";
	int fd = pinned(word, ifindex), prog;

	snprintf(self, sizeof(self), "/proc/self/fd/%d", fd);
	if (readlink(self, what, sizeof(what) - 1) < 0 || strcmp(what, "anon_inode:bpf-link"))
		return fd;
	if (bpf_link_get_info_by_fd(fd, &info, &len))
		err(2, "%s_%d", word, ifindex);
	close(fd);
	prog = bpf_prog_get_fd_by_id(info.prog_id);
	if (prog < 0)
		err(2, "program of %s_%d", word, ifindex);
	return prog;
}

static int agent(const char *file)
{
	static const char *const word[2] = { "from", "to" };

	counters_known = false;
	if (run_lifter("--once", file))
		return -1;
	for (int dir = 0; dir < 2; dir++)
		for (int l2 = 0; l2 < 2; l2++) {
			if (door[dir][l2])
				close(door[dir][l2]);
			door[dir][l2] = door_open(word[dir], link_index[l2]);
		}
	for (int i = 0; i < N_MAPS; i++) {
		if (map_fd[i])
			close(map_fd[i]);
		map_fd[i] = pinned(map_name[i], 0);
	}
	return 0;
}

/* === rows ================================================================= */
static int digit(char c)
{
	const char *all = "0123456789abcdef", *at = strchr(all, c);

	if (!c || !at)
		errx(2, "line %d: %c is not hexadecimal", line, c);
	return at - all;
}

static int from_hex(const char *text, unsigned char *to, int most)
{
	int n = 0;

	for (; text[0] && text[1] && n < most; text += 2, n++)
		to[n] = digit(text[0]) << 4 | digit(text[1]);
	if (*text)
		errx(2, "line %d: too long, or half a byte", line);
	return n;
}

struct result {
	int verdict, len;
	bool refused, bad_csum;
	int n_reasons, n_events, reason; /* counters that went up; the last that is a reason */
	bool twice;			 /* one went up by more than one */
	char counters[512];		 /* their names */
	unsigned char out[MAX_FRAME];
};

static bool is_event(int reason)
{
	return reason == TL_FLOW_NEW || reason == TL_FLOW_HEALED || reason == TL_PORT_CHANGED ||
		reason == TL_UNANSWERED || reason == TL_MSS_CLAMPED;
}

static void run_frame(const char *where, const unsigned char *in, int len, struct result *r)
{
	bool to = !strncmp(where, "to", 2), l2 = where[to ? 2 : 4] == '2',
	     complete = where[to ? 3 : 5] == 'c';
	struct __sk_buff skb = {
		.ifindex = link_index[l2]
	}; /* so that it is for this host, by its address */
	LIBBPF_OPTS(bpf_test_run_opts, o, .data_in = in, .data_size_in = len, .data_out = r->out,
		    .data_size_out = MAX_FRAME, .repeat = 1, .ctx_in = &skb,
		    .ctx_size_in = sizeof(skb),
		    .flags = complete ? BPF_F_TEST_SKB_CHECKSUM_COMPLETE : 0);
	static __u64 after[TL_N_REASONS];
	__u64 before[TL_N_REASONS];
	int e;

	r->refused = r->bad_csum = r->twice = false;
	r->n_reasons = r->n_events = 0;
	r->reason = -1;
	r->counters[0] = 0;
	if (!counters_known)
		counters_read(after);
	counters_known = true; /* nobody else is here: the links are down */
	memcpy(before, after, sizeof(before));
	e = bpf_prog_test_run_opts(door[to][l2], &o);
	if (e == -EINVAL && o.flags) {
		o.flags = 0;
		e = bpf_prog_test_run_opts(door[to][l2], &o);
	}
	counters_read(after);
	r->refused = e == -EINVAL;
	r->bad_csum = e == -EBADMSG;
	if (e && !r->refused && !r->bad_csum)
		errx(2, "line %d: BPF_PROG_TEST_RUN: %s", line, strerror(-e));
	r->verdict = o.retval;
	r->len = e ? 0 : o.data_size_out;
	for (int i = 0; i < TL_N_REASONS; i++) {
		if (after[i] == before[i])
			continue;
		r->twice |= after[i] != before[i] + 1;
		if (is_event(i)) {
			r->n_events++;
		} else {
			r->n_reasons++;
			r->reason = i;
		}
		if (r->counters[0])
			strcat(r->counters, ",");
		strcat(r->counters, reasons[i].name);
	}
}

/* Are these the same names, in whatever order? None is part of another's end or
 * beginning between commas. */
static bool same_counters(const char *want, const char *are)
{
	char copy[512], padded[600], name[64];

	snprintf(copy, sizeof(copy), "%s", want);
	snprintf(padded, sizeof(padded), ",%s,", are);
	if (strlen(want) != strlen(are))
		return false;
	for (char *at = strtok(copy, ","); at; at = strtok(NULL, ",")) {
		snprintf(name, sizeof(name), ",%s,", at);
		if (!strstr(padded, name))
			return false;
	}
	return true;
}

static void say(const char *name, const char *state, const struct result *r, bool same)
{
	bool bad = !strcmp(state, "FAIL");

	n_passed += !bad;
	n_failed += bad;
	if (quiet && !bad)
		return;
	printf("%d %s %s", line, state, name);
	if (r) {
		printf(" %d %s %s", r->verdict, r->counters[0] ? r->counters : "-",
		       r->bad_csum	  ? "skb-csum" :
			       r->refused ? "-" :
			       same	  ? "=" :
					    "");
		for (int i = 0; i < r->len && !same; i++)
			putchar("0123456789abcdef"[r->out[i] >> 4]),
				putchar("0123456789abcdef"[r->out[i] & 15]);
	}
	putchar('\n');
}

static void row(char **arg)
{
	static unsigned char in[MAX_FRAME], out[MAX_FRAME];
	static struct result r;
	int len = from_hex(arg[4], in, MAX_FRAME), n = len;
	bool same, good;

	if (arg[5][0] == '=' || arg[5][0] == '-')
		memcpy(out, in, len);
	else
		n = from_hex(arg[5], out, MAX_FRAME);
	run_frame(arg[1], in, len, &r);
	same = r.len == len && !memcmp(r.out, in, len);
	good = !r.refused && !r.bad_csum && !r.twice && r.verdict == atoi(arg[2]) &&
		same_counters(arg[3], r.counters) &&
		(arg[5][0] == '-' || (r.len == n && !memcmp(r.out, out, n)));
	say(arg[0], good ? "ok" : "FAIL", &r, same);
}

/* Is this what may come of a frame with that reason? */
static bool suits(const struct result *r, int len, bool same)
{
	switch (reasons[r->reason].fate) {
	case PASS:
		return r->verdict == TC_ACT_UNSPEC && r->len == len &&
			(same || r->reason == TL_REQUEST_SENT || r->reason == TL_REPLY_SENT ||
			 r->reason == TL_ICMP_ERROR);
	case DROP:
		return r->verdict == TC_ACT_SHOT && same;
	default: /* an answer, or none */
		return r->verdict ==
			(strstr(r->counters, "unanswered") ? TC_ACT_SHOT : TC_ACT_REDIRECT);
	}
}

static void any(char **arg)
{
	static unsigned char in[MAX_FRAME];
	static struct result r;
	int len = from_hex(arg[2], in, MAX_FRAME);
	bool same, good;

	run_frame(arg[1], in, len, &r);
	same = r.len == len && !memcmp(r.out, in, len);
	good = r.n_reasons == 1 && !r.twice && !r.bad_csum && suits(&r, len, same);
	say(arg[0], r.refused ? "refused" : good ? "ok" : "FAIL", &r, same);
}

/* === lines ================================================================ */
static enum map map_named(const char *name)
{
	for (int i = 0; i < N_MAPS; i++)
		if (!strcmp(name, map_name[i]))
			return i;
	errx(2, "line %d: no map %s", line, name);
}

static void element(const char *word, char **arg)
{
	unsigned char key[256], value[4096] __attribute__((aligned(8)));
	enum map map = map_named(arg[0]);
	bool there;
	int e = 0;

	from_hex(arg[1], key, sizeof(key));
	if (!strcmp(word, "put")) {
		from_hex(arg[2], value, sizeof(value));
		if (map == CT)
			((struct tl_flow *)value)->seen = last_use();
		e = bpf_map_update_elem(map_fd[map], key, value, BPF_ANY);
	} else if (!strcmp(word, "delete")) {
		bpf_map_delete_elem(map_fd[map], key);
	} else if (!strcmp(word, "age")) {
		e = map_age(map, key, atoi(arg[2]));
	} else {
		there = !bpf_map_lookup_elem(map_fd[map], key, value);
		e = there != !strcmp(arg[2], "yes");
	}
	if (e || !strcmp(word, "has"))
		say(word, e ? "FAIL" : "ok", NULL, true);
}

static void do_line(char *text)
{
	char *arg[8] = { "", "", "", "", "", "", "", "" }, *word = strtok(text, " \n");
	int n = 0;

	while (word && n < 8 && (arg[n] = strtok(NULL, " \n")))
		n++;
	if (!word || *word == '#')
		return;
	if (!strcmp(word, "row") && n == 6)
		row(arg);
	else if (!strcmp(word, "any") && n >= 2)
		any((char *[]){ arg[0], arg[1], n == 3 ? arg[2] : "" });
	else if (!strcmp(word, "agent") && n == 1)
		say("agent", agent(arg[0]) ? "FAIL" : "ok", NULL, true);
	else if (!strcmp(word, "clear"))
		map_clear(map_fd[CT]), map_clear(map_fd[AFF]), map_clear(map_fd[FRAG]);
	else if (n >= 2 &&
		 (!strcmp(word, "put") || !strcmp(word, "delete") || !strcmp(word, "age") ||
		  !strcmp(word, "has")))
		element(word, arg);
	else
		errx(2, "line %d: what is %s with %d words?", line, word, n);
}

static void cleanup(void)
{
	static pid_t me;

	if (!me)
		me = getpid();
	else if (me == getpid()) /* not in a child that could not exec */
		run_lifter("--cleanup", NULL);
}

int main(int argc, char **argv)
{
	char *text = NULL;
	size_t room = 0;
	cpu_set_t one;

	quiet = argc > 1 && !strcmp(argv[1], "-q");
	if (argc != 3 + quiet)
		errx(2, "usage: prog_run [-q] LIFTER PIN_DIR <VECTORS");
	lifter = argv[1 + quiet];
	pin_dir = argv[2 + quiet];
	if (unshare(CLONE_NEWNET))
		err(2, "unshare: run as root");
	CPU_ZERO(&one);
	CPU_SET(0, &one);
	sched_setaffinity(0, sizeof(one), &one); /* answers are limited per CPU */
	link_index[0] = link_make("vpn3", IFF_TUN);
	link_index[1] = link_make("vpn2", IFF_TAP);
	cleanup(); /* remembers who we are */
	atexit(cleanup);
	while (getline(&text, &room, stdin) > 0) {
		line++;
		do_line(text);
		if (line == 1 && n_failed)
			errx(2, "%s does not start", lifter);
	}
	printf("%d passed, %d failed\n", n_passed, n_failed);
	return n_failed > 0;
}
