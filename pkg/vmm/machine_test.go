package vmm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/microvm-runtime/microvm/pkg/internal/fdtest"
	"github.com/microvm-runtime/microvm/pkg/kvm"
	"github.com/microvm-runtime/microvm/pkg/vmm/boot/boottest"
	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

// The kernels of these tests are a few 64-bit instructions, which any /dev/kvm
// can run. tinyAddr is where they are, and tinyCounter a word they may use.
const (
	tinyAddr    = uint64(kernelLowest)
	tinyCounter = uint64(0x30000)
)

// Instructions.
func outb(port uint16, v uint8) []byte {
	return []byte{0x66, 0xba, byte(port), byte(port >> 8), 0xb0, v, 0xee} // mov dx, port; mov al, v; out dx, al
}

// store32 stores v at addr.
func store32(addr uint64, v uint32) []byte {
	b := binary.LittleEndian.AppendUint64([]byte{0x48, 0xbf}, addr)   // mov rdi, addr
	return binary.LittleEndian.AppendUint32(append(b, 0xc7, 0x07), v) // mov dword [rdi], v
}

// store64 stores v at addr.
func store64(addr, v uint64) []byte {
	b := binary.LittleEndian.AppendUint64([]byte{0x48, 0xb8}, v)         // mov rax, v
	return binary.LittleEndian.AppendUint64(append(b, 0x48, 0xa3), addr) // mov [addr], rax
}

// mapPCI maps the starts of the PCI window and of the ECAM to themselves: the
// page tables of the entry end at 1 GiB.
func mapPCI() []byte {
	const present, writable, large = 1, 2, 1 << 7
	const directory = 0x31000 // for the fourth GiB
	return bytes.Join([][]byte{
		store64(uint64(pageTablesAddr)+0x1000+3*8, directory|present|writable),
		store64(directory+(pciWindowAddr>>21&511)*8, pciWindowAddr|present|writable|large),
		store64(directory+(ecamAddr>>21&511)*8, ecamAddr|present|writable|large),
	}, nil)
}

var (
	tinyPowerOff = outb(sleepControlPort, 5<<2|1<<5)
	// tinySpin counts at tinyCounter for ever.
	tinySpin = append(binary.LittleEndian.AppendUint64([]byte{0x48, 0xbf}, tinyCounter), // mov rdi, tinyCounter
		0xff, 0x07, // inc dword [rdi]
		0xeb, 0xfc) // jmp to the inc
)

// tinyKernel makes a vmlinux of the instructions.
func tinyKernel(t *testing.T, code ...[]byte) *os.File {
	t.Helper()
	return tempFile(t, boottest.Kernel(tinyAddr, bytes.Join(code, nil)))
}

func tempFile(t *testing.T, contents []byte) *os.File {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	if _, err := file.Write(contents); err != nil {
		t.Fatal(err)
	}
	return file
}

func openKVM(t testing.TB) *os.File {
	t.Helper()
	file, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return file
}

func tinyConfig(t *testing.T, code ...[]byte) Config {
	return Config{
		KVM: openKVM(t), Kernel: tinyKernel(t, code...),
		CommandLine: "tiny", MemoryBytes: minMemory, VCPUs: 1,
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
}

func TestTinyExits(t *testing.T) {
	pvpanicCommand := uint64(ecamAddr) + 4 // device 0: there is no other
	for _, tc := range []struct {
		name string
		code [][]byte
		want ExitReason
	}{
		{"power off", [][]byte{tinyPowerOff, tinySpin}, ExitPowerOff},
		{"reset", [][]byte{outb(resetPort, resetValue), tinySpin}, ExitReset},
		{"nothing else ends it", [][]byte{
			outb(sleepControlPort, 5<<2), outb(sleepControlPort, 4<<2|1<<5), outb(sleepStatusPort, 0xff),
			outb(resetPort, 0), outb(0x80, 1), outb(0xcf9, 6), outb(0x64, 0xfe), outb(0xffff, 1), tinyPowerOff, tinySpin,
		}, ExitPowerOff},
		{"panic", [][]byte{mapPCI(), store32(pvpanicCommand, 2), store32(pciWindowAddr, pvpanicPanicked), tinySpin}, ExitPanic},
		{"other pvpanic events", [][]byte{mapPCI(), store32(pvpanicCommand, 2), store32(pciWindowAddr, 2), tinyPowerOff, tinySpin}, ExitPowerOff},
		{"pvpanic not decoded", [][]byte{mapPCI(), store32(pciWindowAddr, pvpanicPanicked), tinyPowerOff, tinySpin}, ExitPowerOff},
		{"triple fault", [][]byte{{0x0f, 0x0b}}, ExitTripleFault}, // ud2 without an IDT
	} {
		t.Run(tc.name, func(t *testing.T) {
			m, err := New(tinyConfig(t, tc.code...))
			if err != nil {
				t.Fatal(err)
			}
			exit, err := m.Run()
			if exit.Reason != tc.want || err != nil {
				t.Errorf("%v (%s), %v; want %v", exit.Reason, exit.Detail, err, tc.want)
			}
			if _, err := m.Run(); err == nil {
				t.Error("a second Run was allowed")
			}
		})
	}
}

func TestRunError(t *testing.T) {
	// A jump to where there is no memory: KVM can neither run nor emulate it.
	m, err := New(tinyConfig(t, []byte{0xb8, 0, 0, 0, 0x20, 0xff, 0xe0})) // mov eax, 0x20000000; jmp rax
	if err != nil {
		t.Fatal(err)
	}
	exit, err := m.Run()
	if exit.Reason != ExitError || err == nil || !strings.Contains(err.Error(), "vCPU 0") {
		t.Errorf("%v (%s), %v", exit.Reason, exit.Detail, err)
	}
}

func TestDebugConsole(t *testing.T) {
	var code [][]byte
	for _, c := range []byte("hello\nbye") {
		code = append(code, outb(uartPort, c))
	}
	c := tinyConfig(t, append(code, tinyPowerOff, tinySpin)...)
	var out bytes.Buffer
	c.DebugConsole = &out
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Run(); err != nil || out.String() != "hello\nbye" {
		t.Errorf("console %q, %v", &out, err)
	}
}

// TestEntryState has the guest see the command line and where rsi points.
func TestEntryState(t *testing.T) {
	c := tinyConfig(t,
		[]byte{0x8b, 0x86, 0x28, 2, 0, 0, // mov eax, [rsi+0x228]: cmd_line_ptr
			0x8a, 0x00, // mov al, [rax]
			0x66, 0xba, uartPort & 0xff, uartPort >> 8, 0xee}, // mov dx, uart; out dx, al
		tinyPowerOff, tinySpin)
	var out bytes.Buffer
	c.DebugConsole = &out
	var phases []string
	c.Phase = func(name string) { phases = append(phases, name) }
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Run(); err != nil || out.String() != "t" {
		t.Errorf("console %q, %v", &out, err)
	}
	if strings.Join(phases, " ") != "kernel-loaded vcpus-running" {
		t.Errorf("phases %q", phases)
	}
}

// counter reads the word that tinySpin counts in.
func counter(t *testing.T, m *Machine) uint32 {
	t.Helper()
	b, err := m.memory.Slice(memory.GuestAddress(tinyCounter), 4)
	if err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint32(b)
}

// waitFor polls until done says so; the limit only ends a test that fails.
func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	for range 30000 {
		if done() {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("waited in vain for " + what)
}

func TestPauseResumeStop(t *testing.T) {
	c := tinyConfig(t, tinySpin)
	c.VCPUs = 3 // two of which never start
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan Exit)
	go func() {
		exit, _ := m.Run()
		ended <- exit
	}()
	moves := func() bool {
		before := counter(t, m)
		time.Sleep(time.Millisecond)
		return counter(t, m) != before
	}
	waitFor(t, "the guest", moves)
	for range 20 {
		if err := m.Pause(); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if moves() {
				t.Fatal("the guest runs while it is paused")
			}
		}
		if err := m.Resume(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the guest after Resume", moves)
	}
	stats, err := m.VCPUStats()
	if err != nil || len(stats) != 3 || stats[0].Exits["signal"] == 0 {
		t.Errorf("statistics %+v, %v", stats, err)
	}
	if err := m.Pause(); err != nil { // stopping a paused machine
		t.Fatal(err)
	}
	m.Stop()
	m.Stop()
	if exit := <-ended; exit.Reason != ExitStopped || !strings.HasPrefix(exit.Detail, "vCPU 0 at rip 0x10000") || strings.Contains(exit.Detail, "vCPU 1") {
		t.Errorf("exit %+v", exit)
	}
	if m.Pause() == nil || m.Resume() == nil {
		t.Error("a machine that has ended was paused or resumed")
	}
}

// TestConcurrentControl has everybody pull at the machine at once; the race
// detector watches.
func TestConcurrentControl(t *testing.T) {
	m, err := New(tinyConfig(t, tinySpin))
	if err != nil {
		t.Fatal(err)
	}
	var done sync.WaitGroup
	for range 3 {
		done.Go(func() {
			for range 50 {
				if m.Pause() != nil || m.Resume() != nil {
					return
				}
				if _, err := m.VCPUStats(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	go func() {
		done.Wait()
		m.Stop()
	}()
	if exit, err := m.Run(); exit.Reason != ExitStopped || err != nil {
		t.Errorf("%v, %v", exit, err)
	}
}

func TestStopBeforeRun(t *testing.T) {
	m, err := New(tinyConfig(t, tinySpin))
	if err != nil {
		t.Fatal(err)
	}
	m.Stop()
	if exit, err := m.Run(); exit.Reason != ExitStopped || err != nil {
		t.Errorf("%v, %v", exit, err)
	}
}

// TestStartVCPUs adds vCPUs to a machine that runs, that is paused and that has
// ended. The guest starts the second one after it has been made.
func TestStartVCPUs(t *testing.T) {
	const (
		flag     = 0x30010 // the guest may send its IPIs
		counter2 = 0x30008 // where the second processor counts
		vector   = 8       // the page that it starts at
		icrHigh  = localAPICAddr + 0x310
		icrLow   = localAPICAddr + 0x300
	)
	// mov ax, 0x3000; mov ds, ax; inc word [8]; jmp to the inc
	second := append([]byte{0xb8, 0x00, 0x30, 0x8e, 0xd8, 0xff, 0x06, 0x08, 0x00, 0xeb, 0xfa}, make([]byte, 5)...)
	c := tinyConfig(t,
		mapPCI(),
		store64(0x31000+(localAPICAddr>>21&511)*8, localAPICAddr|present|writable|large),
		store64(vector<<12, binary.LittleEndian.Uint64(second)),
		store64(vector<<12+8, binary.LittleEndian.Uint64(second[8:])),
		binary.LittleEndian.AppendUint64([]byte{0x48, 0xbf}, flag), // mov rdi, flag
		[]byte{0x83, 0x3f, 0x00, 0x74, 0xfb},                       // cmp dword [rdi], 0; je to the cmp
		store32(icrHigh, 1<<24), store32(icrLow, 0x4500),           // INIT
		store32(icrHigh, 1<<24), store32(icrLow, 0x4600|vector), // SIPI
		tinySpin)
	c.MaxVCPUs = 4
	m := start(t, c)
	vcpus := func() (threads int) {
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, v := range m.vcpus {
			if v.tid != 0 {
				threads++
			}
		}
		return threads
	}
	waitFor(t, "the first vCPU", func() bool { return vcpus() == 1 })
	for _, n := range []int{2, 1, 2} { // none is taken back
		if err := m.StartVCPUs(n); err != nil {
			t.Fatal(err)
		}
	}
	words, err := m.memory.Slice(0x30000, 0x20)
	if err != nil {
		t.Fatal(err)
	}
	words[flag&0xfff] = 1
	moves := func() bool {
		before := binary.LittleEndian.Uint16(words[counter2&0xfff:])
		time.Sleep(time.Millisecond)
		return binary.LittleEndian.Uint16(words[counter2&0xfff:]) != before
	}
	waitFor(t, "the second processor", moves)

	if err := m.Pause(); err != nil {
		t.Fatal(err)
	}
	if err := m.StartVCPUs(4); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "vCPUs that begin paused", func() bool { return vcpus() == 4 })
	if err := m.Pause(); err != nil { // with the new ones
		t.Fatal(err)
	}
	for range 3 {
		if moves() {
			t.Error("the second processor runs while it is paused")
		}
	}
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the second processor after Resume", moves)
	if err := m.StartVCPUs(5); err == nil {
		t.Error("more vCPUs than the machine can have")
	}
	if stats, err := m.VCPUStats(); err != nil || len(stats) != 4 {
		t.Errorf("%d vCPUs, %v", len(stats), err)
	}
	m.Stop()
	if err := m.StartVCPUs(4); !errors.Is(err, errEnded) {
		t.Errorf("a machine that has ended: %v", err)
	}
}

// TestStartVCPUsFails: a vCPU that could not be made in full can be made later, and
// nothing is left of it at the end.
func TestStartVCPUsFails(t *testing.T) {
	c := tinyConfig(t, tinySpin)
	c.MaxVCPUs = 4
	before := fdtest.Count(t)
	for _, later := range []bool{true, false} {
		m, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		whole := m.newVCPU
		m.newVCPU = func(id int) (*vcpu, error) {
			return m.createVCPU(id, make([]kvm.CPUIDEntry, 257), 0) // more than KVM takes
		}
		for range 2 {
			if err := m.StartVCPUs(3); err == nil || !strings.Contains(err.Error(), "vCPU 1: KVM_SET_CPUID2") {
				t.Errorf("started: %v", err)
			}
		}
		m.newVCPU = whole
		if later {
			if err := m.StartVCPUs(3); err != nil {
				t.Error(err)
			}
			if stats, err := m.VCPUStats(); err != nil || len(stats) != 3 {
				t.Errorf("%d vCPUs, %v", len(stats), err)
			}
		}
		m.Stop()
		if _, err := m.Run(); err != nil {
			t.Error(err)
		}
	}
	if n := fdtest.Count(t); n != before {
		t.Errorf("%d descriptors, there were %d", n, before)
	}
}

// TestStartVCPUsWhileStarting has two goroutines add them while the machine starts
// and ends.
func TestStartVCPUsWhileStarting(t *testing.T) {
	for range 5 {
		c := tinyConfig(t, tinySpin)
		c.MaxVCPUs = 4
		m, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		var adders sync.WaitGroup
		for range 2 {
			adders.Go(func() {
				for n := range 5 {
					if err := m.StartVCPUs(min(n, 4)); err != nil && !errors.Is(err, errEnded) {
						t.Error(err)
					}
				}
			})
		}
		go m.Stop()
		if exit, err := m.Run(); exit.Reason != ExitStopped || err != nil {
			t.Errorf("%v, %v", exit, err)
		}
		adders.Wait()
	}
}

func TestInitrd(t *testing.T) {
	c := tinyConfig(t,
		[]byte{0x8b, 0x86, 0x18, 2, 0, 0, // mov eax, [rsi+0x218]: ramdisk_image
			0x8a, 0x00, // mov al, [rax]
			0x66, 0xba, uartPort & 0xff, uartPort >> 8, 0xee},
		tinyPowerOff, tinySpin)
	c.Initrd = tempFile(t, []byte("initrd"))
	var out bytes.Buffer
	c.DebugConsole = &out
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Run(); err != nil || out.String() != "i" {
		t.Errorf("console %q, %v", &out, err)
	}
}

type oddDevice struct{ virtio.Device }

func (oddDevice) Type() uint16         { return virtio.TypeRNG }
func (oddDevice) Features() uint64     { return 0 }
func (oddDevice) QueueSizes() []uint16 { return nil }

func TestNewRefuses(t *testing.T) {
	notKVM, empty := tempFile(t, []byte("x")), tempFile(t, nil)
	for name, tc := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"no vCPU":                   {func(c *Config) { c.VCPUs = 0 }, "0 vCPUs"},
		"too many vCPUs":            {func(c *Config) { c.VCPUs = 33 }, "33 vCPUs"},
		"too many in the end":       {func(c *Config) { c.MaxVCPUs = 33 }, "33 vCPUs"},
		"not /dev/kvm":              {func(c *Config) { c.KVM = notKVM }, "KVM_GET_API_VERSION"},
		"no memory":                 {func(c *Config) { c.MemoryBytes = 0 }, "at least 32 MiB"},
		"odd memory":                {func(c *Config) { c.MemoryBytes += 4096 }, "multiple of 1 MiB"},
		"more than addressable":     {func(c *Config) { c.MemoryBytes = 1 << 56 }, "guest memory"},
		"kernel is no kernel":       {func(c *Config) { c.Kernel = notKVM }, "ELF header"},
		"kernel is empty":           {func(c *Config) { c.Kernel = empty }, "ELF header"},
		"command line too long":     {func(c *Config) { c.CommandLine = strings.Repeat("x", 2048) }, "command line"},
		"command line with NUL":     {func(c *Config) { c.CommandLine = "a\x00b" }, "command line"},
		"empty initrd":              {func(c *Config) { c.Initrd = empty }, "initrd"},
		"empty persistent memory":   {func(c *Config) { c.Pmem = []PmemConfig{{File: empty}} }, "persistent memory"},
		"device without queues":     {func(c *Config) { c.Devices = []virtio.Device{oddDevice{}} }, "queues"},
		"persistent memory no file": {func(c *Config) { c.Pmem = []PmemConfig{{File: c.KVM}} }, "persistent memory"},
	} {
		t.Run(name, func(t *testing.T) {
			c := tinyConfig(t, tinySpin)
			tc.change(&c)
			m, err := New(c)
			if err == nil {
				m.Stop()
				m.Run()
				t.Fatal("accepted")
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %q does not say %q", err, tc.want)
			}
		})
	}
}

// TestInitrdTooBig needs the kernel's end, so it is not in the table.
func TestInitrdTooBig(t *testing.T) {
	c := tinyConfig(t, tinySpin)
	c.Initrd = tempFile(t, []byte("x"))
	if err := c.Initrd.Truncate(minMemory - int64(kernelLowest)); err != nil {
		t.Fatal(err)
	}
	if _, err := New(c); err == nil || !strings.Contains(err.Error(), "do not fit") {
		t.Errorf("New: %v", err)
	}
}

// TestPmem maps files and looks at what the machine made of them.
func TestPmem(t *testing.T) {
	c := tinyConfig(t, tinyPowerOff, tinySpin)
	file := tempFile(t, []byte("contents"))
	c.Pmem = []PmemConfig{{File: file, ReadOnly: true}, {File: file}}
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	var found []memory.Region
	for _, r := range m.memory.Regions() {
		if r.Start >= highMemoryAddr {
			found = append(found, r)
		}
	}
	if len(found) != 2 || !found[0].ReadOnly || found[1].ReadOnly {
		t.Fatalf("%d regions", len(found))
	}
	for _, r := range found {
		if uint64(r.Start)%pmemAlign != 0 || len(r.Bytes) != pmemSizeUnit || string(r.Bytes[:9]) != "contents\x00" || r.Bytes[pmemSizeUnit-1] != 0 {
			t.Errorf("region at %#x, %d bytes", r.Start, len(r.Bytes))
		}
	}
	copy(found[1].Bytes, "CONTENTS")
	var got [8]byte
	if _, err := file.ReadAt(got[:], 0); err != nil || string(got[:]) != "CONTENTS" {
		t.Errorf("the file has %q, %v", got, err)
	}
	if _, err := m.Run(); err != nil {
		t.Error(err)
	}
}

func TestMemoryAboveTheHole(t *testing.T) {
	c := tinyConfig(t, tinyPowerOff, tinySpin)
	c.MemoryBytes = 5 << 30
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	r := m.memory.Regions()
	if len(r) != 2 || r[0].Start != 0 || r[0].End() != lowMemoryEnd || r[1].Start != highMemoryAddr || len(r[1].Bytes) != 2<<30 {
		t.Errorf("regions %+v", r)
	}
	var ram uint64
	for _, e := range e820(c.MemoryBytes) {
		if e.Type == 1 {
			ram += e.Size
		}
	}
	if lost := c.MemoryBytes - ram; lost != uint64(kernelLowest-conventionalEnd) {
		t.Errorf("%#x bytes are in no RAM entry", lost)
	}
	if _, err := m.Run(); err != nil {
		t.Error(err)
	}
}
