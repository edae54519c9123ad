package kvm

import (
	"fmt"
	"os"
	"slices"
)

// System is /dev/kvm.
type System struct {
	file *os.File
}

// NewSystem wraps an open /dev/kvm, which stays the caller's. It fails when the
// file is no KVM device or speaks another version of the API.
func NewSystem(file *os.File) (*System, error) {
	s := &System{file: file}
	version, err := s.GetAPIVersion()
	if err != nil {
		return nil, err
	}
	if version != APIVersion {
		return nil, fmt.Errorf("KVM API version is %d, not %d", version, APIVersion)
	}
	return s, nil
}

func (s *System) fd() int { return int(s.file.Fd()) }

// GetAPIVersion is KVM_GET_API_VERSION.
func (s *System) GetAPIVersion() (int, error) {
	v, err := ioctl(s.fd(), reqGetAPIVersion, 0)
	if err != nil {
		return 0, fmt.Errorf("KVM_GET_API_VERSION: %w", err)
	}
	return v, nil
}

// CheckExtension is KVM_CHECK_EXTENSION: 0 when the capability is missing,
// otherwise a positive number whose meaning depends on the capability.
func (s *System) CheckExtension(capability int) (int, error) {
	v, err := ioctl(s.fd(), reqCheckExtension, uintptr(capability))
	if err != nil {
		return 0, fmt.Errorf("KVM_CHECK_EXTENSION %d: %w", capability, err)
	}
	return v, nil
}

// GetSupportedCPUID is KVM_GET_SUPPORTED_CPUID.
func (s *System) GetSupportedCPUID() ([]CPUIDEntry, error) {
	arg := cpuid2{N: maxCPUIDEntries}
	if _, err := ioctlPtr(s.fd(), reqGetSupportedCPUID, &arg); err != nil {
		return nil, fmt.Errorf("KVM_GET_SUPPORTED_CPUID: %w", err)
	}
	return slices.Clone(arg.Entries[:min(arg.N, maxCPUIDEntries)]), nil
}

// CreateVM is KVM_CREATE_VM with machine type 0. The caller owns the VM and
// closes it.
func (s *System) CreateVM() (*VM, error) {
	mmapSize, err := ioctl(s.fd(), reqGetVCPUMmapSize, 0)
	if err != nil {
		return nil, fmt.Errorf("KVM_GET_VCPU_MMAP_SIZE: %w", err)
	}
	fd, err := ioctl(s.fd(), reqCreateVM, 0)
	if err != nil {
		return nil, fmt.Errorf("KVM_CREATE_VM: %w", err)
	}
	return &VM{fd: fd, mmapSize: mmapSize}, nil
}
