// Package seccomp makes filters of system calls, seccomp(2), from lists that
// lie beside the code that needs the calls.
//
// A call that no rule allows ends the process at once (SECCOMP_RET_KILL_PROCESS),
// with the signal SIGSYS; the kernel's audit log names the call by its number.
package seccomp

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Rule allows a system call if all of its conditions hold.
type Rule struct {
	Call int // unix.SYS_*
	Args []Arg
}

// Arg is a condition: (argument & Mask) == Value. The kernel sees an argument as
// 64 bits, also where it uses 32 of them: a Mask of 32 bits ignores the others, as
// the kernel does.
type Arg struct {
	Index int // 0 to 5
	Mask  uint64
	Value uint64
}

// Int is an Arg for a C int that has exactly this value.
func Int(index int, value uint32) Arg {
	return Arg{Index: index, Mask: 0xffffffff, Value: uint64(value)}
}

// Clear is an Arg that has none of these bits.
func Clear(index int, bits uint64) Arg { return Arg{Index: index, Mask: bits} }

// Calls allows system calls with any arguments.
func Calls(calls ...int) []Rule {
	var rules []Rule
	for _, c := range calls {
		rules = append(rules, Rule{Call: c})
	}
	return rules
}

// Ioctls allows the ioctl requests.
func Ioctls(requests ...uint32) []Rule {
	var rules []Rule
	for _, r := range requests {
		rules = append(rules, Rule{unix.SYS_IOCTL, []Arg{Int(1, r)}})
	}
	return rules
}

// Filter is a compiled filter.
type Filter []unix.SockFilter

// Offsets in struct seccomp_data, include/uapi/linux/seccomp.h.
const (
	dataNr   = 0
	dataArch = 4
	dataArgs = 16
)

const (
	load   = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	and    = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
	jumpEq = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	jump   = unix.BPF_JMP | unix.BPF_JA
	ret    = unix.BPF_RET | unix.BPF_K
)

// Compile makes a filter that allows what one of the rules does. The rules of a
// call are tried in their order. A call of which one rule has no condition is
// allowed whatever the others say; the kernel then needs no filter to know.
func Compile(lists ...[]Rule) (Filter, error) {
	var order []int
	rules := map[int][]Rule{}
	for _, list := range lists {
		for _, r := range list {
			if rules[r.Call] == nil {
				order = append(order, r.Call)
			}
			rules[r.Call] = append(rules[r.Call], r)
		}
	}
	f := Filter{
		{Code: load, K: dataArch},
		{Code: jumpEq, Jt: 1, K: unix.AUDIT_ARCH_X86_64},
		{Code: ret, K: unix.SECCOMP_RET_KILL_PROCESS},
		// A call of the x32 ABI has a bit in its number that no rule has.
		{Code: load, K: dataNr},
	}
	for _, call := range order {
		block, err := compileCall(rules[call])
		if err != nil {
			return nil, fmt.Errorf("rule of system call %d: %w", call, err)
		}
		f = append(f,
			unix.SockFilter{Code: jumpEq, Jt: 1, K: uint32(call)},
			unix.SockFilter{Code: jump, K: uint32(len(block))})
		f = append(f, block...)
	}
	f = append(f, unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_KILL_PROCESS})
	const most = 4096 // BPF_MAXINSNS
	if len(f) > most {
		return nil, fmt.Errorf("a filter of %d instructions: at most %d", len(f), most)
	}
	return f, nil
}

// compileCall decides about a call whose number is known.
func compileCall(rules []Rule) (Filter, error) {
	allow := unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW}
	var block Filter
	for _, r := range rules {
		if len(r.Args) == 0 {
			return Filter{allow}, nil
		}
		one, err := compileArgs(r.Args)
		if err != nil {
			return nil, err
		}
		block = append(append(block, one...), allow)
	}
	return append(block, unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_KILL_PROCESS}), nil
}

// compileArgs jumps over the one instruction that follows unless all conditions
// hold.
func compileArgs(args []Arg) (Filter, error) {
	var f Filter
	var tests []int // the jumps
	half := func(offset int, mask, value uint32) {
		if mask == 0 {
			return
		}
		f = append(f, unix.SockFilter{Code: load, K: uint32(offset)})
		if mask != 0xffffffff {
			f = append(f, unix.SockFilter{Code: and, K: mask})
		}
		tests = append(tests, len(f))
		f = append(f, unix.SockFilter{Code: jumpEq, K: value})
	}
	for _, a := range args {
		if a.Index < 0 || a.Index > 5 || a.Mask == 0 || a.Value&^a.Mask != 0 {
			return nil, fmt.Errorf("condition %+v is none", a)
		}
		at := dataArgs + 8*a.Index // little endian
		half(at, uint32(a.Mask), uint32(a.Value))
		half(at+4, uint32(a.Mask>>32), uint32(a.Value>>32))
	}
	for _, i := range tests {
		over := len(f) - i // what is between, and the one instruction
		if over > 255 {
			return nil, errors.New("too many conditions")
		}
		f[i].Jf = uint8(over)
	}
	return f, nil
}

// Install puts the calling thread under the filter, and the threads that it makes
// later. The thread must not be able to gain privileges (PR_SET_NO_NEW_PRIVS).
func (f Filter) Install() error { return f.install(0) }

// InstallAll puts all threads of the process under the filter, at once.
func (f Filter) InstallAll() error { return f.install(unix.SECCOMP_FILTER_FLAG_TSYNC) }
