# A guest for tests of Firecracker, up in a hundredth of a second: a kernel of 600 bytes that counts its boots on its own disk
# and says so with its kernel arguments on the serial port, then ends the VMM when Ctrl-Alt-Del is pressed.
#
# Built with `--defsym MODE=0`; MODE=1 is deaf to Ctrl-Alt-Del, MODE=2 ends as soon as it is up. It starts in 64-bit mode with
# the first GiB mapped and the boot parameters in rsi (Linux' Documentation/x86/boot.rst, 64-bit boot protocol).
	.code64
	.set PAGES, 0x180000		# a page directory for the fourth GiB, where the devices are
	.set PDPT_3, 0xa018		# the VMM's own page directory pointer table at 0xa000, entry 3
	.set IDT, 0x181000
	.set BOX, 0x182000		# request header; data at +0x200, status at +0x400
	.set RINGS, 0x183000		# descriptors; available ring at +0x100, used ring at +0x200
	.set DEVICES, 0xd0000000	# of Firecracker's virtio-mmio, a page each

	.globl _start
_start:
	cld
	mov 0x228(%rsi), %ebp		# cmd_line_ptr
	mov $PAGES, %edi
	mov $0xc0000083, %eax
	mov $512, %ecx
1:	stosq
	add $0x200000, %eax
	loop 1b
	mov $PAGES + 3, %eax
	mov %rax, PDPT_3
	mov %cr3, %rax
	mov %rax, %cr3

	mov $DEVICES, %ebx		# the first block device (device id 2) is the root disk
2:	cmpl $2, 8(%rbx)
	je 3f
	add $0x1000, %ebx
	jmp 2b

3:	xor %eax, %eax			# virtio 1.2, 3.1.1 and 4.2.2: every status bit is one step
	mov %eax, 0x70(%rbx)
	movl $1, 0x70(%rbx)
	movl $3, 0x70(%rbx)
	movl $1, 0x24(%rbx)
	movl $1, 0x20(%rbx)		# VIRTIO_F_VERSION_1
	mov %eax, 0x24(%rbx)
	mov %eax, 0x20(%rbx)
	movl $11, 0x70(%rbx)
	mov %eax, 0x30(%rbx)
	movl $4, 0x38(%rbx)
	mov $RINGS, %ecx
	mov %ecx, 0x80(%rbx)
	mov %eax, 0x84(%rbx)
	add $0x100, %ecx
	mov %ecx, 0x90(%rbx)
	mov %eax, 0x94(%rbx)
	add $0x100, %ecx
	mov %ecx, 0xa0(%rbx)
	mov %eax, 0xa4(%rbx)
	movl $1, 0x44(%rbx)
	movl $15, 0x70(%rbx)

	mov $RINGS, %edi
	mov $BOX, %esi
	mov %rsi, (%rdi)		# header, 16 bytes, next
	movl $16, 8(%rdi)
	movl $0x00010001, 12(%rdi)
	lea 0x200(%rsi), %eax		# data, one sector, next
	mov %rax, 16(%rdi)
	movl $512, 24(%rdi)
	lea 0x400(%rsi), %eax		# status, one byte, written by the device
	mov %rax, 32(%rdi)
	movl $1, 40(%rdi)
	movl $2, 44(%rdi)
	movb $1, 8(%rsi)		# sector 1: an ext4 filesystem leaves it alone
	movl $0x00020003, 28(%rdi)	# read: the device writes the data
	call request
	incb 0x200(%rsi)
	movb $1, (%rsi)			# write: type 1
	movl $0x00020001, 28(%rdi)
	call request

	mov $0x60, %al			# the 8042's command byte: interrupt on keys; without it keys are lost
	out %al, $0x64
	mov $1, %al
	out %al, $0x60
	mov 0x200(%rsi), %al
	add $'0', %al
	mov %al, digit(%rip)
	lea boots(%rip), %rsi		# from here on it hears Ctrl-Alt-Del
	call print
	mov %rbp, %rsi
	call print
	lea newline(%rip), %rsi
	call print
	.if MODE == 2
	jmp end
	.endif

	mov $IDT + 0x21 * 16, %edi	# interrupt 0x21: IRQ 1, the keyboard
	lea handler(%rip), %rax
	mov %ax, (%rdi)
	mov %cs, 2(%rdi)
	movw $0x8e00, 4(%rdi)
	shr $16, %eax
	mov %ax, 6(%rdi)
	lidt idtr(%rip)
	mov $0x11, %al			# the first 8259A: vectors from 0x20, IRQ 1 alone
	out %al, $0x20
	mov $0x20, %al
	out %al, $0x21
	mov $4, %al
	out %al, $0x21
	mov $1, %al
	out %al, $0x21
	mov $0xfd, %al
	out %al, $0x21
4:	cli				# looked at before waiting: keys may have come before the interrupt was on
	in $0x64, %al
	test $1, %al
	jnz 9f
	sti
	hlt
	jmp 4b
9:	in $0x60, %al
	.if MODE == 1
	jmp 4b
	.endif
end:
	mov $0xfe, %al			# the 8042's reset line
	out %al, $0x64
5:	hlt
	jmp 5b

handler:
	push %rax
	mov $0x20, %al
	out %al, $0x20
	pop %rax
	iretq

request:				# queues descriptor 0 and waits until the device has used it
	movzwl 0x102(%rdi), %ecx
	inc %ecx
	mov %cx, 0x102(%rdi)
	movl $0, 0x50(%rbx)
6:	pause
	cmp %cx, 0x202(%rdi)
	jne 6b
	ret

print:
	mov $0x3f8, %edx
7:	lodsb
	test %al, %al
	jz 8f
	out %al, %dx
	jmp 7b
8:	ret

idtr:	.word 0x22 * 16 - 1
	.quad IDT
boots:	.ascii "\r\nguest: boot "
digit:	.ascii "0\r\nguest: arguments \0"
newline: .ascii "\r\n\0"
