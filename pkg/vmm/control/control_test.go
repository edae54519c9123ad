package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/internal/alloctest"
)

// The VMM of these tests is the test binary itself: vmmBinary makes a script
// that starts it with the name of one of these in the environment.
var vmms = map[string]func(*Server){
	"serve":          vmmServe,
	"boot-fails":     func(s *Server) { s.ReplyBoot(vmmBoot(s), errors.New("no memory for the guest")) },
	"dies-at-boot":   func(s *Server) { vmmBoot(s); os.Exit(7) },
	"powers-off":     func(s *Server) { s.ReplyBoot(vmmBoot(s), nil); s.Exited(Exit{Reason: ReasonPowerOff}) },
	"hangs-up":       func(s *Server) { s.ReplyBoot(vmmBoot(s), nil); s.conn.unix.Close(); time.Sleep(time.Hour) },
	"talks-nonsense": vmmNonsense,
	"never-reads":    func(s *Server) { s.ReplyBoot(vmmBoot(s), nil); time.Sleep(time.Hour) },
	"shuts-its-ears": func(s *Server) { r := vmmBoot(s); s.conn.unix.CloseRead(); s.ReplyBoot(r, nil); time.Sleep(time.Hour) },

	"gives-itself-away":           func(s *Server) { vmmGivesItselfAway(s, false) },
	"gives-itself-away-in-flight": func(s *Server) { vmmGivesItselfAway(s, true) },
}

const vmmEnv = "MICROVM_CONTROL_TEST_VMM"

// vmmID is the user id of these VMMs, which nobody else has. Launch needs root.
const vmmID = 1999999998

func TestMain(m *testing.M) {
	if name := os.Getenv(vmmEnv); name != "" {
		s, err := NewServer(os.NewFile(3, "control"))
		if err != nil {
			panic(err)
		}
		vmms[name](s)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func vmmBoot(s *Server) *BootRequest {
	r, err := s.Boot()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
	return r
}

// vmmServe echoes what is sent to a dialled port, and connects to host port
// 1024 as the agent does.
func vmmServe(s *Server) {
	r := vmmBoot(s)
	s.Phase("vcpus-running")
	s.ReplyBoot(r, nil)
	ours, theirs, err := Socketpair()
	if err != nil {
		panic(err)
	}
	s.Accepted(1024, theirs)
	theirs.Close()
	kernel, _ := io.ReadAll(r.Files[FileKernel])
	fmt.Fprintf(ours, "%d cpus, kernel %s", r.Config.VCPUs, kernel)
	ours.Close()
	paused := false
	err = s.Serve(Handler{
		Dial: func(_ context.Context, port uint32) (*os.File, error) {
			if port != 1025 {
				return nil, errors.New("connection refused")
			}
			a, b, err := Socketpair()
			if err != nil {
				return nil, err
			}
			go func() { io.Copy(a, a); a.Close() }()
			return b, nil
		},
		Pause: func() error {
			if paused {
				return errors.New("paused already")
			}
			paused = true
			return nil
		},
		Resume: func() error { paused = false; return nil },
		Stats:  func() (Stats, error) { return Stats{Exits: map[string]uint64{"io": 7}}, nil },
		Stop:   func() { s.Exited(Exit{Reason: ReasonStopped, Detail: "vCPU 0 halted"}) },
		// The addresses say what arrived.
		AttachNIC: func(nic NIC, taps []*os.File) (string, error) {
			defer closeAll(taps)
			var names []string
			for _, tap := range taps {
				name, err := io.ReadAll(tap)
				if err != nil {
					return "", err
				}
				names = append(names, string(name))
			}
			return fmt.Sprintf("%s %d %v", nic.MAC, nic.MTU, names), nil
		},
		AttachDisk: func(disk Disk, file *os.File) (string, error) {
			defer file.Close()
			if disk.Serial == "" {
				return "", errors.New("the bus is full")
			}
			content, err := io.ReadAll(file)
			return fmt.Sprintf("%s %v %s", disk.Serial, disk.ReadOnly, content), err
		},
		Detach: func(address string) error {
			if address != "0000:00:07.0" {
				return errors.New("no such device")
			}
			return nil
		},
		Resize: func(want Size) (Size, error) {
			if want.VCPUs > r.Config.MaxVCPUs {
				return Size{}, errors.New("too many")
			}
			return Size{VCPUs: want.VCPUs, MemoryBytes: want.MemoryBytes / 2}, nil
		},
	})
	if err != nil {
		panic(err)
	}
}

func vmmNonsense(s *Server) {
	r := vmmBoot(s)
	for range 100 {
		s.Phase("again")
		a, b, err := Socketpair()
		if err != nil {
			panic(err)
		}
		s.Accepted(1024, b) // nobody accepts
		s.Accepted(9, b)    // nobody listens
		s.conn.send(context.Background(), message{Method: "accepted", Body: json.RawMessage(`"x"`)}, nil, b)
		s.conn.send(context.Background(), message{ID: 1 << 40}, nil, a, b)
		s.conn.send(context.Background(), message{Method: "surprise"}, map[string]int{"a": 1}, a)
		a.Close()
		b.Close()
	}
	s.ReplyBoot(r, nil)
	s.ReplyBoot(r, nil)
	s.conn.unix.Write([]byte("{not json"))
	time.Sleep(time.Hour)
}

func vmmBinary(t *testing.T, name string) string {
	t.Helper()
	script := filepath.Join(t.TempDir(), "vmm")
	text := fmt.Sprintf("#!/bin/sh\nexec /usr/bin/env %s=%s '%s' \"$@\"\n", vmmEnv, name, os.Args[0])
	if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return script
}

func tempFile(t *testing.T, content string) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteString(content); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	return f
}

func launch(t *testing.T, name string) (*VMM, error) {
	t.Helper()
	v, err := Launch(t.Context(), Options{
		Binary:  vmmBinary(t, name),
		Name:    []string{"default/web", "two words\x00" + strings.Repeat("x", MaxName)},
		KVM:     tempFile(t, "kvm"),
		Kernel:  tempFile(t, "vmlinux"),
		Image:   tempFile(t, "image"),
		Console: tempFile(t, ""),
		Log:     os.Stderr,
		ID:      vmmID,
		Root:    tempFile(t, ""), // these VMMs do not look at it
		Config:  Config{VCPUs: 2, MaxVCPUs: 4, MemoryBytes: 1 << 28, ListenPorts: []uint32{1024}},
	})
	if err == nil {
		t.Cleanup(func() { v.Kill(); <-v.Done() })
	}
	return v, err
}

func TestLifeOfAVMM(t *testing.T) {
	v, err := launch(t, "serve")
	if err != nil {
		t.Fatal(err)
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", v.Pid()))
	if want := "\x00sandbox\x00default/web\x00two?words?" + strings.Repeat("x", MaxName-10) + "\x00"; err != nil || !strings.HasSuffix(string(line), want) {
		t.Errorf("ps shows %q, %v", line, err)
	}
	agent, err := v.Accept(t.Context(), 1024)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(agent)
	if err != nil || string(got) != "2 cpus, kernel vmlinux" {
		t.Fatalf("%q, %v", got, err)
	}
	agent.Close()

	stream, err := v.Dial(t.Context(), 1025)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(stream, "hello")
	if err := stream.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(stream); err != nil || string(got) != "hello" {
		t.Fatalf("%q, %v", got, err)
	}
	stream.Close()

	if _, err := v.Dial(t.Context(), 7); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("Dial of a closed port: %v", err)
	}
	if _, err := v.Accept(t.Context(), 7); err == nil {
		t.Error("Accept on a port that is not listened on succeeded")
	}
	if err := v.Pause(t.Context()); err != nil {
		t.Error(err)
	}
	if err := v.Pause(t.Context()); err == nil || err.Error() != "paused already" {
		t.Errorf("second Pause: %v", err)
	}
	if err := v.Resume(t.Context()); err != nil {
		t.Error(err)
	}
	if now, err := v.Resize(t.Context(), Size{VCPUs: 3, MemoryBytes: 8 << 30}); err != nil || now != (Size{3, 4 << 30}) {
		t.Errorf("Resize: %+v, %v", now, err)
	}
	if _, err := v.Resize(t.Context(), Size{VCPUs: 5}); err == nil || !strings.HasSuffix(err.Error(), "too many") {
		t.Errorf("Resize to too many vCPUs: %v", err)
	}
	if s, err := v.Stats(t.Context()); err != nil || s.Exits["io"] != 7 {
		t.Errorf("Stats: %v, %v", s, err)
	}
	testHotplug(t, v)
	if p := v.Phases(); len(p) != 1 || p[0].Name != "vcpus-running" || p[0].Monotonic <= 0 {
		t.Errorf("Phases: %v", p)
	}
	if err := v.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if err := v.Kill(); err != nil {
		t.Fatal(err)
	}
	if e := v.Exit(); e.Reason != ReasonStopped || e.Detail != "vCPU 0 halted" {
		t.Errorf("Exit: %v", e)
	}
	if _, err := v.Dial(t.Context(), 1025); err == nil || !strings.Contains(err.Error(), "ended") {
		t.Errorf("Dial after the end: %v", err)
	}
	if _, err := v.Accept(t.Context(), 1024); err == nil {
		t.Error("Accept after the end succeeded")
	}
	if err := v.Kill(); err != nil {
		t.Errorf("second Kill: %v", err)
	}
}

func testHotplug(t *testing.T, v *VMM) {
	t.Helper()
	nic := NIC{MAC: "02:00:00:00:00:01", MTU: 1450, QueuePairs: 2}
	taps := []*os.File{tempFile(t, "tap a"), tempFile(t, "tap b")}
	if at, err := v.AttachNIC(t.Context(), nic, taps); err != nil || at != "02:00:00:00:00:01 1450 [tap a tap b]" {
		t.Errorf("AttachNIC: %q, %v", at, err)
	}
	if _, err := v.AttachNIC(t.Context(), nic, taps[:1]); err == nil {
		t.Error("AttachNIC with a tap too few succeeded")
	}
	if at, err := v.AttachDisk(t.Context(), Disk{ReadOnly: true, Serial: "data"}, tempFile(t, "disk")); err != nil || at != "data true disk" {
		t.Errorf("AttachDisk: %q, %v", at, err)
	}
	if _, err := v.AttachDisk(t.Context(), Disk{}, tempFile(t, "")); err == nil || !strings.Contains(err.Error(), "full") {
		t.Errorf("AttachDisk that is refused: %v", err)
	}
	if err := v.Detach(t.Context(), "0000:00:07.0"); err != nil {
		t.Errorf("Detach: %v", err)
	}
	if err := v.Detach(t.Context(), "0000:00:08.0"); err == nil || !strings.Contains(err.Error(), "no such device") {
		t.Errorf("Detach of nothing: %v", err)
	}
}

func TestHowAVMMEnds(t *testing.T) {
	for _, tc := range []struct {
		vmm     string
		bootErr string // in the error of Launch
		reason  string
	}{
		{vmm: "boot-fails", bootErr: "no memory for the guest"},
		{vmm: "dies-at-boot", bootErr: "exit status 7"},
		{vmm: "powers-off", reason: ReasonPowerOff},
		{vmm: "hangs-up", reason: ReasonKilled},
		{vmm: "talks-nonsense", reason: ReasonKilled},
		{vmm: "gives-itself-away", reason: ReasonPowerOff},
		{vmm: "gives-itself-away-in-flight", reason: ReasonPowerOff},
	} {
		t.Run(tc.vmm, func(t *testing.T) {
			v, err := launch(t, tc.vmm)
			if tc.bootErr != "" {
				if err == nil || !strings.Contains(err.Error(), tc.bootErr) {
					t.Fatalf("Launch: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if e := v.Exit(); e.Reason != tc.reason {
				t.Errorf("Exit: %v, want %s", e, tc.reason)
			}
			if n := len(v.Phases()); n > maxPhases {
				t.Errorf("%d phases kept", n)
			}
		})
	}
}

func TestLaunchWithoutBinary(t *testing.T) {
	f := tempFile(t, "")
	_, err := Launch(t.Context(), Options{Binary: "/nonexistent/microvm-vmm", ID: vmmID, Root: f, KVM: f, Kernel: f, Image: f, Console: f, Log: f})
	if !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("Launch: %v", err)
	}
}

func TestBadBootRequests(t *testing.T) {
	boot := func(body string) message { return message{Method: methodBoot, Body: json.RawMessage(body)} }
	for name, tc := range map[string]struct {
		m     message
		files int
	}{
		"another method":  {message{Method: methodDial, Body: json.RawMessage(`{"port":1}`)}, 0},
		"no body":         {message{Method: methodBoot}, 0},
		"wrong type":      {boot(`{"files":"kvm"}`), 0},
		"fewer files":     {boot(`{"files":["kvm","kernel","image","console"]}`), 3},
		"more files":      {boot(`{"files":["kvm","kernel","image","console"]}`), 5},
		"file twice":      {boot(`{"files":["kvm","kernel","image","console","kvm"]}`), 5},
		"console missing": {boot(`{"files":["kvm","kernel","image","shared"]}`), 4},
	} {
		var files []*os.File
		for range tc.files {
			files = append(files, tempFile(t, ""))
		}
		if _, err := parseBoot(tc.m, files); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestTapsAtBoot(t *testing.T) {
	o := Options{Binary: "/nonexistent/microvm-vmm", Config: Config{NICs: []NIC{{QueuePairs: 2}}}}
	if _, err := Launch(t.Context(), o); err == nil || !strings.Contains(err.Error(), "taps for 0") {
		t.Errorf("no taps: %v", err)
	}
	o.Taps = [][]*os.File{{tempFile(t, "")}}
	if _, err := Launch(t.Context(), o); err == nil || !strings.Contains(err.Error(), "2 queue pairs, 1 taps") {
		t.Errorf("one tap: %v", err)
	}
}

// refuseAttach is a Handler to which no bad request must come.
func refuseAttach(t *testing.T) Handler {
	return Handler{
		AttachNIC: func(NIC, []*os.File) (string, error) { t.Error("a NIC was attached"); return "", nil },
		AttachDisk: func(_ Disk, file *os.File) (string, error) {
			t.Error("a disk was attached")
			return "", nil
		},
	}
}

func TestBadAttachRequests(t *testing.T) {
	for name, tc := range map[string]struct {
		body  string
		files int
	}{
		"no body":         {"", 0},
		"no device":       {"{}", 1},
		"both":            {`{"nic":{"queue_pairs":1},"disk":{}}`, 1},
		"wrong type":      {`{"nic":7}`, 1},
		"no queue pairs":  {`{"nic":{}}`, 0},
		"negative":        {`{"nic":{"queue_pairs":-1}}`, 0},
		"fewer taps":      {`{"nic":{"queue_pairs":2}}`, 1},
		"more taps":       {`{"nic":{"queue_pairs":2}}`, 3},
		"disk, no file":   {`{"disk":{}}`, 0},
		"disk, two files": {`{"disk":{}}`, 2},
	} {
		var files []*os.File
		for range tc.files {
			files = append(files, tempFile(t, ""))
		}
		m := message{Method: methodAttach, Body: json.RawMessage(tc.body)}
		if _, err := attach(refuseAttach(t), m, files); err == nil {
			t.Errorf("%s: accepted", name)
		}
		for _, f := range files {
			if err := f.Close(); !errors.Is(err, os.ErrClosed) {
				t.Errorf("%s: a file was left open", name)
			}
		}
	}
}

// FuzzReceive sends arbitrary packets to both ends' parsers.
func FuzzReceive(f *testing.F) {
	f.Add([]byte(`{"method":"boot","body":{"config":{"vcpus":1},"files":["kvm","kernel","image","console"]}}`), uint8(4))
	f.Add([]byte(`{"id":1,"error":"x"}`), uint8(1))
	f.Add([]byte(`{"method":"attach","body":{"nic":{"mac":"02:00:00:00:00:01","queue_pairs":2}}}`), uint8(2))
	f.Add([]byte(`{"method":"attach","body":{"disk":{"read_only":true}}}`), uint8(1))
	f.Add([]byte(`{"method":"accepted","body":{"port":1024}}`), uint8(1))
	f.Add([]byte(`{"method":"exit","body":{"reason":"panic"}}`), uint8(0))
	null, err := os.Open(os.DevNull)
	if err != nil {
		f.Fatal(err)
	}
	buf, oob := scratch()
	f.Fuzz(func(t *testing.T, packet []byte, n uint8) {
		defer alloctest.Limit(t, 4<<20)()
		if len(packet) == 0 || len(packet) > maxMessage {
			return
		}
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		a, err := newConn(os.NewFile(uintptr(fds[0]), ""))
		if err != nil {
			t.Fatal(err)
		}
		defer a.unix.Close()
		b, err := newConn(os.NewFile(uintptr(fds[1]), ""))
		if err != nil {
			t.Fatal(err)
		}
		defer b.unix.Close()
		var rights []byte
		for range n % 8 {
			rights = append(rights, unix.UnixRights(int(null.Fd()))...)
		}
		if _, _, err := a.unix.WriteMsgUnix(packet, rights, nil); err != nil {
			return // several control messages at once: the kernel's to refuse
		}
		m, files, err := b.receive(buf, oob)
		if err != nil {
			return
		}
		parseBoot(m, files)
		if m.Method == methodAttach {
			attach(Handler{
				AttachNIC:  func(nic NIC, taps []*os.File) (string, error) { return "", nic.checkTaps(taps) },
				AttachDisk: func(Disk, *os.File) (string, error) { return "", nil },
			}, m, files)
		}
		v := &VMM{
			accept:  map[uint32]chan *net.UnixConn{1024: make(chan *net.UnixConn, 1)},
			pending: map[uint64]chan reply{1: make(chan reply, 1)},
		}
		v.dispatch(m, files)
		closeAll(files)
	})
}

// TestOrderOfResizes puts several into the socket before the VMM reads: it does
// them in their order, as the shim counts on the last one. What else it is asked for
// does not wait for them.
func TestOrderOfResizes(t *testing.T) {
	v, theirs, read := hostileVMM(t)
	const last = 20
	for i := range last {
		if err := v.conn.send(t.Context(), message{ID: uint64(i + 1), Method: methodResize}, Size{VCPUs: i + 1}); err != nil {
			t.Fatal(err)
		}
	}
	v.nextID = last
	began, paused := make(chan int, last), make(chan struct{})
	var served sync.WaitGroup
	served.Go(func() {
		s := Server{conn: theirs}
		s.Serve(Handler{
			Pause: func() error { close(paused); return nil },
			Resize: func(want Size) (Size, error) {
				began <- want.VCPUs
				if want.VCPUs == last {
					<-paused
				}
				return want, nil
			},
		})
	})
	for i := range last {
		if n := <-began; n != i+1 {
			t.Errorf("resize %d was done as number %d", n, i+1)
		}
	}
	if err := v.Pause(t.Context()); err != nil {
		t.Error(err)
	}
	v.conn.unix.Close()
	served.Wait()
	theirs.unix.Close()
	read.Wait()
}
