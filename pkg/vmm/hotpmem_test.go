package vmm

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/rng"
)

// pmemRegions are those of the windows.
func pmemRegions(m *Machine) (list []memory.Region) {
	for _, r := range m.memory.Regions() {
		if r.Blocks != nil && r.ReadOnly {
			list = append(list, r)
		}
	}
	return list
}

func TestHotPmem(t *testing.T) {
	m := startTiny(t, tinySpin)
	var held []byte
	for i := range 3 {
		content := fmt.Sprintf("contents %d", i)
		first, err := m.AttachPmem(tempFile(t, []byte(content)))
		if err != nil {
			t.Fatal(err)
		}
		second, err := m.AttachPmem(tempFile(t, bytes.Repeat([]byte{'x'}, pmemSizeUnit+1)))
		if err != nil || second == first {
			t.Fatalf("%s and %s, %v", first, second, err)
		}
		// The windows are used again.
		r := pmemRegions(m)
		if len(r) != 2 || r[0].Start%pmemAlign != 0 || r[1].Start%pmemAlign != 0 || !m.pmem[1].seen {
			t.Fatalf("%d windows", len(r))
		}
		if b, err := m.memory.ReadSlice(r[0].Start, 16); err != nil || !strings.HasPrefix(string(b), content+"\x00") {
			t.Errorf("the guest has %q, %v", b, err)
		} else {
			held = b
		}
		if b, err := m.memory.ReadSlice(r[1].Start+pmemSizeUnit, 2); err != nil || string(b) != "x\x00" {
			t.Errorf("the guest has %q at the end of the file, %v", b, err)
		}
		if _, err := m.memory.Slice(r[0].Start, 1); err == nil {
			t.Error("a device may write to it")
		}
		for _, address := range []string{first, second} {
			if err := m.Detach(address); err != nil {
				t.Error(err)
			}
		}
		if _, err := m.memory.ReadSlice(r[0].Start, 1); err == nil {
			t.Error("it is still there")
		}
		if !bytes.Equal(held, make([]byte, 16)) { // accessible, but nothing of the file
			t.Errorf("who holds a slice has %q", held)
		}
	}
	if n := len(m.devices); n != 0 {
		t.Errorf("%d devices are left", n)
	}
}

func TestHotPmemLimits(t *testing.T) {
	m := startTiny(t, tinySpin)
	file := tempFile(t, []byte("contents"))
	large := tempFile(t, nil)
	if err := large.Truncate(MaxHotPmem + 1); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for name, file := range map[string]*os.File{"empty": tempFile(t, nil), "large": large, "directory": dir} {
		if _, err := m.AttachPmem(file); err == nil {
			t.Errorf("%s: attached", name)
		}
	}
	var addresses []string
	for range pmemWindows {
		address, err := m.AttachPmem(file)
		if err != nil {
			t.Fatal(err)
		}
		addresses = append(addresses, address)
	}
	if _, err := m.AttachPmem(file); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("one too many: %v", err)
	}
	if err := m.Detach(addresses[3]); err != nil {
		t.Fatal(err)
	}
	if address, err := m.AttachPmem(file); err != nil || address != addresses[3] {
		t.Errorf("%s, %v", address, err)
	}
	m.physBits = 20
	m.pmem = m.pmem[:pmemWindows-1]
	if _, err := m.AttachPmem(file); err == nil || !strings.Contains(err.Error(), "20 bits") {
		t.Errorf("without room: %v", err)
	}
}

// The bus may be full when the file is in its window already.
func TestHotPmemWithoutPlace(t *testing.T) {
	m := startTiny(t, tinySpin)
	for range 31 - 1 {
		if _, err := m.Attach(rng.New(rand.Reader)); err != nil {
			t.Fatal(err)
		}
	}
	file := tempFile(t, []byte("contents"))
	address, err := m.AttachPmem(file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.AttachPmem(file); err == nil || !strings.Contains(err.Error(), "full") {
		t.Errorf("%v", err)
	}
	if w := m.pmem[1]; w.device != nil || w.seen {
		t.Errorf("the window is not free: %+v", w)
	}
	if err := m.Detach(address); err != nil {
		t.Fatal(err)
	}
	if _, err := m.AttachPmem(file); err != nil {
		t.Error(err)
	}
}
